"""Darkroom with what its services know of each other: plans with orders that wait, rates that replicas are told."""

import pytest

from darkroom.policy.cacheplan import CachePlan, Outlook, StageOutlook
from darkroom.policy.planning import Planned
from darkroom.policy.popularity import Band
from simulator.cluster import Cluster, Hardware
from simulator.costs import Loader, Sizes, Work
from simulator.generator import generate
from simulator.live import LiveConfig
from simulator.run import Settings, replay
from simulator.served import Served
from simulator.worker import DEVICE, REMOTE, Job
from simulator.workload import Request, compressed

LOADER = Loader(network_s=16.0, disk_s=2.0, bus_s=1.0, attach_s=0.0, is_streaming=True, overlaps=True)
CONFIG = LiveConfig(loader=LOADER, work=Work(fixed_s=0.0, step_s=0.1), max_images=8, model_bytes=10**9)


def request(number: int, at_s: float, base: str, steps: int = 10) -> Request:
    return Request(number=number, arrival_s=at_s, base=base, image_count=1, step_count=steps)


def serve(
    requests: list[Request],
    *,
    workers: int = 2,
    rooms: tuple[float, float, float] = (1.0, 3.0, 9.0),
    plans: bool = True,
) -> tuple[Cluster, list[Job]]:
    served = Served(CONFIG, requests, Planned() if plans else None)
    cluster = Cluster(served, Hardware(worker_count=workers, rooms=rooms), Sizes(0, spread=0.0), seed=0)
    return cluster, cluster.replay(requests)


def test_what_is_asked_for_often_comes_to_a_second_replica_that_nobody_asked() -> None:
    first = [request(1000, 0.0, "a", steps=15), request(1001, 30.0, "a", steps=15)]  # tell what loads and steps take
    requests = [*first, *(request(number, 60.0 + 2.0 * number, "a", steps=25) for number in range(300))]
    for plans in (True, False):
        found = {job.tier for job in serve(requests, plans=plans)[1] if job.worker_id == 1}
        assert DEVICE in found
        assert (REMOTE in found) == (not plans)


def test_replicas_keep_what_the_plan_says_the_cluster_asks_for() -> None:
    """The second worker never ran a request for "a"."""
    for rate, dropped in ((1.0, "b"), (0.0, "a")):
        served = Served(CONFIG, [request(0, 0.0, "a"), request(1, 0.0, "b")], None)
        cluster = Cluster(served, Hardware(worker_count=2, rooms=(2.0, 9.0, 9.0)), Sizes(0, spread=0.0), seed=0)
        worker = cluster.workers[1]
        for name in ("a", "b"):
            worker.shelves[DEVICE].put(name, 1.0, 0.0)
        served._appraisals[1].worth.add("b", 0.0, 1.0)
        stages = {"denoiser": StageOutlook(rate=rate, run_s=1.0)}
        served._plan = CachePlan(outlooks=(Outlook(model_id="a", band=Band.HOT, stages=stages),))
        assert worker.shelves[DEVICE].make_room(1.0)
        assert dropped not in worker.shelves[DEVICE]


def test_a_request_that_finds_its_model_on_its_way_waits_for_the_rest_and_takes_that_for_the_load() -> None:
    """It comes half a second before the model, which nobody asked for, has moved to the device."""
    requests = [request(0, 16.5, "a"), request(1, 40.0, "a")]
    served = Served(CONFIG, requests, None)
    cluster = Cluster(served, Hardware(worker_count=1, rooms=(1.0, 3.0, 9.0)), Sizes(0, spread=0.0), seed=0)
    cluster.workers[0].prefetch("a", DEVICE)
    jobs = {job.request.number: job for job in cluster.replay(requests)}
    assert [jobs[number].start_s for number in (0, 1)] == pytest.approx([17.0, 40.0])
    assert list(served._assignments._forecast._load_s.values()) == pytest.approx([0.5])


def test_what_services_know_of_each_other_is_enough() -> None:
    requests = compressed(generate(600, seed=3), 8.0)
    found = {
        name: replay(name, requests, Settings(), seed=3)[0]
        for name in ("lru", "darkroom-batched", "darkroom-as-served", "darkroom-as-served-without-plans")
    }
    served = found["darkroom-as-served"]
    assert served.mean_s < 0.6 * found["lru"].mean_s
    assert served.mean_s < 1.25 * found["darkroom-batched"].mean_s
    assert served.mean_s < found["darkroom-as-served-without-plans"].mean_s
