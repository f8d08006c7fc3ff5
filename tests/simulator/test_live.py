"""A live cluster's counterpart: requests go where their models are, and evictions keep what is asked for often."""

import math
import random
import statistics
from dataclasses import replace
from typing import Literal

import pytest

from darkroom.policy.worth import Tier
from simulator.cluster import Cluster, Hardware
from simulator.costs import Loader, Sizes, Work
from simulator.live import Live, LiveConfig
from simulator.worker import DEVICE, HOST, Job
from simulator.workload import Request

Kind = Literal["worth", "lru"]
KINDS: tuple[Kind, ...] = ("worth", "lru")
NAMES = tuple(f"m{number}" for number in range(6))
LOADER = Loader(network_s=0.0, disk_s=2.0, bus_s=0.0, attach_s=0.0, is_streaming=True, overlaps=True)


def serve(requests: list[Request], eviction: Kind, *, workers: int, room: float) -> list[Job]:
    config = LiveConfig(
        loader=LOADER, work=Work(fixed_s=0.1, step_s=0.05), eviction=eviction, model_bytes=10**9, model_names=NAMES
    )
    hardware = Hardware(worker_count=workers, rooms=(room, 0.0, 100.0))
    return Cluster(Live(config), hardware, Sizes(0, spread=0.0), seed=0).replay(requests)


def request(number: int, at_s: float, base: str) -> Request:
    return Request(number=number, arrival_s=at_s, base=base, image_count=1, step_count=10)


@pytest.mark.parametrize("eviction", KINDS)
def test_a_request_alone_takes_its_load_its_steps_and_the_rest(eviction: Kind) -> None:
    jobs = serve([request(0, 0.0, "m0"), request(1, 10.0, "m0")], eviction, workers=1, room=1.0)
    assert [job.finish_s - job.request.arrival_s for job in jobs] == pytest.approx([2.0 + 0.5 + 0.1, 0.5 + 0.1])


def test_loads_and_steps_share_the_cores_of_the_machine() -> None:
    config = LiveConfig(loader=LOADER, work=Work(fixed_s=0.1, step_s=0.05), model_bytes=10**9, model_names=NAMES)
    hardware = Hardware(worker_count=2, rooms=(1.0, 0.0, 100.0), core_count=1.0)
    cluster = Cluster(Live(config), hardware, Sizes(0, spread=0.0), seed=0)
    _, warm, cold = cluster.replay([request(0, 0.0, "m0"), request(1, 10.0, "m0"), request(2, 10.0, "m1")])
    assert warm.finish_s == pytest.approx(10.0 + 2 * 0.6, abs=1e-3)  # half of the core: the other half loads
    assert cold.finish_s == pytest.approx(10.0 + 2.6 + 0.6, abs=1e-3)


def test_a_load_slows_the_steps_of_its_own_replica_even_with_cores_to_spare() -> None:
    config = LiveConfig(loader=LOADER, work=Work(fixed_s=0.1, step_s=0.05), model_bytes=10**9, model_names=NAMES)
    hardware = Hardware(worker_count=1, rooms=(2.0, 0.0, 100.0), core_count=8.0)
    cluster = Cluster(Live(config), hardware, Sizes(0, spread=0.0), seed=0)
    _, warm, cold = cluster.replay([request(0, 0.0, "m0"), request(1, 10.0, "m0"), request(2, 10.0, "m1")])
    assert warm.finish_s == pytest.approx(10.0 + 2 * 0.5 + 0.1, abs=1e-3)
    assert cold.finish_s == pytest.approx(10.0 + 2.5 + 0.6, abs=1e-3)


def test_loads_may_take_more_or_less_than_usual() -> None:
    def latencies(seed: int) -> list[float]:
        loader = replace(LOADER, spread=0.3)
        config = LiveConfig(loader=loader, work=Work(fixed_s=0.1, step_s=0.05), model_names=NAMES)
        cluster = Cluster(
            Live(config), Hardware(worker_count=1, rooms=(1.0, 0.0, 9.0)), Sizes(0, spread=0.0), seed=seed
        )
        jobs = cluster.replay([request(n, 20.0 * n, NAMES[n % 6]) for n in range(60)])
        return [job.finish_s - job.request.arrival_s - 0.6 for job in jobs]

    found = latencies(1)
    assert found == latencies(1) != latencies(2)
    assert 1.7 < statistics.median(found) < 2.3
    assert 0.2 < statistics.pstdev(map(math.log, found)) < 0.4


def test_requests_go_where_their_model_is() -> None:
    jobs = serve([request(n, 10.0 * n, NAMES[n % 2]) for n in range(12)], "worth", workers=2, room=1.0)
    assert len({(job.request.base, job.worker_id) for job in jobs}) == 2


def test_evictions_by_worth_keep_what_is_asked_for_often() -> None:
    rng, requests, at_s = random.Random(3), [], 0.0
    for number in range(400):
        at_s += rng.expovariate(0.5)
        requests.append(request(number, at_s, rng.choices(NAMES, (40, 20, 1, 1, 1, 1))[0]))
    by_worth, by_age = (serve(requests, kind, workers=1, room=3.0) for kind in KINDS)
    assert sum(job.tier != DEVICE for job in by_worth) < sum(job.tier != DEVICE for job in by_age)


def test_memory_comes_before_disk_and_a_load_that_runs_before_another_one() -> None:
    config = LiveConfig(loader=LOADER, work=Work(), model_bytes=10**9, model_names=NAMES)
    live = Live(config)
    cluster = Cluster(live, Hardware(worker_count=2, rooms=(2.0, 2.0, 100.0)), Sizes(0, spread=0.0), seed=0)
    live.begin(cluster)
    cluster.workers[1].shelves[HOST].put("m0", 1.0, 0.0)
    assert live.choose(request(0, 0.0, "m0")).worker_id == 1
    cluster.workers[1].shelves[HOST].drop("m0")
    assert live.choose(request(1, 0.0, "m0")).worker_id == 1
    assert live.choose(request(2, 0.0, "m1")).worker_id == 0


def test_what_is_asked_for_is_not_pushed_out_where_another_worker_has_room() -> None:
    live = Live(LiveConfig(loader=LOADER, work=Work(), model_bytes=10**9, model_names=NAMES))
    cluster = Cluster(live, Hardware(worker_count=2, rooms=(2.0, 0.0, 100.0)), Sizes(0, spread=0.0), seed=0)
    live.begin(cluster)
    for name in ("m0", "m1"):
        cluster.workers[0].shelves[DEVICE].put(name, 1.0, 0.0)
    for number in range(4):
        asked = request(number, 0.0, NAMES[number % 2])
        assert live.choose(asked).worker_id == 0
        live.finished(Job(asked, 0, DEVICE))
    assert live.choose(request(9, 0.0, "m2")).worker_id == 1


def test_a_model_on_its_way_to_a_device_is_not_there_yet() -> None:
    live = Live(LiveConfig(loader=replace(LOADER, disk_s=0.0, bus_s=1.0), work=Work(), model_names=NAMES))
    cluster = Cluster(live, Hardware(worker_count=1, rooms=(2.0, 0.0, 100.0)), Sizes(0, spread=0.0), seed=0)
    live.begin(cluster)
    worker = cluster.workers[0]
    worker.prefetch("m0", DEVICE)
    worker.shelves[DEVICE].put("m0", 1.0, 0.0)
    assert live._announced(worker, "m0").tier is Tier.HOST
    assert live._announced(worker, "m1").tier is Tier.DISK
