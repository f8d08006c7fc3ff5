"""Workers that start and stop: by hand, by invariant, and what knowing where models are is worth."""

from collections.abc import Sequence
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.baselines import Baseline, by_recency, least_loaded
from simulator.cluster import Cluster, Hardware
from simulator.costs import DIRECT, Sizes
from simulator.fleet import FleetConfig, anywhere, warmest
from simulator.generator import generate
from simulator.ours import Darkroom, DarkroomConfig
from simulator.run import Settings, replay
from simulator.worker import DEVICE, DISK, HOST
from simulator.workload import SHAPES, Request, compressed, shaped

EQUAL = Sizes(0, spread=0.0, lora=0.0)
AWARE = FleetConfig(choose=warmest, prepares=True, least_count=1)


def ask(number: int, arrival_s: float, base: str = "a", images: int = 1) -> Request:
    return Request(number=number, arrival_s=arrival_s, base=base, step_count=30, image_count=images)


def ours(requests: Sequence[Request], fleet: FleetConfig = AWARE) -> Darkroom:
    return Darkroom(DarkroomConfig(plan_every_s=0.0, fleet=fleet), requests)


def grown(service: Darkroom | Baseline, requests: Sequence[Request], machines: int = 3) -> Cluster:
    cluster = Cluster(service, Hardware(worker_count=machines), EQUAL, seed=0)
    cluster.replay(requests)
    return cluster


def test_work_that_waits_starts_a_worker_which_is_warm_after_its_process_and_its_load() -> None:
    requests = [ask(number, 0.1 * number) for number in range(3)]  # 22 s of work: two workers' at 15 s each
    cluster = grown(ours(requests), requests)
    assert cluster.fleet is not None
    from_afar_s = DIRECT.network_s + DIRECT.bus_s
    assert cluster.fleet.delays_s == [10.0 + from_afar_s]


def test_a_worker_starts_where_the_disk_has_the_model() -> None:
    requests = [ask(number, 0.1 * number) for number in range(3)]
    cluster = Cluster(ours(requests), Hardware(worker_count=6), EQUAL, seed=0)
    cluster.workers[4].shelves[DISK].put("a", 1.0, 0.0)
    cluster.replay(requests)
    assert cluster.fleet is not None
    assert cluster.fleet.delays_s == [10.0 + DIRECT.disk_s + DIRECT.bus_s]
    assert {worker.worker_id for worker in cluster.workers if any(worker.load_counts)} == {0, 4}


def test_production_starts_anywhere_and_loads_when_a_request_comes() -> None:
    requests = [*(ask(number, 0.1 * number) for number in range(6)), ask(6, 40.0)]
    fleet = FleetConfig(choose=anywhere, prepares=False, least_count=1)
    cluster = grown(Baseline(least_loaded, by_recency, fleet=fleet), requests)
    assert cluster.fleet is not None
    assert len(cluster.fleet.delays_s) == 1  # a second one started, and nobody asked it for anything
    assert cluster.fleet.delays_s[0] > 38.0


def test_a_stopped_worker_keeps_its_disk_and_nothing_else() -> None:
    requests = [*(ask(number, 0.1 * number) for number in range(3)), ask(3, 2000.0), ask(4, 2400.0)]
    cluster = grown(ours(requests), requests, machines=2)
    assert cluster.fleet is not None
    assert len(cluster.fleet.up) == 1
    (stopped,) = [worker for worker in cluster.workers if worker not in cluster.fleet.up]
    assert ["a" in stopped.shelves[tier] for tier in (DEVICE, HOST, DISK)] == [False, False, True]
    assert cluster.holders[DEVICE]["a"] == cluster.holders[HOST]["a"] == 1
    assert cluster.held_count(DISK, "a") == 1  # what lies on the other disk is of no use to anybody


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 900), st.sampled_from("abcdef"), st.integers(1, 8)), min_size=1, max_size=40))
def test_every_request_is_answered_and_only_by_workers_that_had_time_to_start(
    drawn: list[tuple[float, str, int]],
) -> None:
    requests = [ask(number, at_s, base, images) for number, (at_s, base, images) in enumerate(sorted(drawn))]
    cluster = Cluster(ours(requests), Hardware(worker_count=4), EQUAL, seed=0)
    jobs = cluster.replay(requests)
    assert cluster.fleet is not None
    assert sorted(job.request.number for job in jobs) == list(range(len(requests)))
    assert all(job.start_s >= AWARE.start_s for job in jobs if job.worker_id)  # the first was up from the start
    assert 1 <= len(cluster.fleet.up) <= 4
    assert all(delay_s >= 10.0 for delay_s in cluster.fleet.delays_s)
    assert cluster.fleet.up_s <= 4 * cluster.clock.now_s


def test_who_knows_where_models_are_scales_out_sooner_than_production() -> None:
    requests = shaped(compressed(generate(1200, seed=3), 8.0), SHAPES["bursts"], seed=3)
    setting = replace(Settings(), hardware=Hardware(worker_count=12))
    figures = {name: replay(name, requests, setting, seed=3)[0] for name in ("lru-scaled", "darkroom-scaled")}
    assert all(each.scale_outs > 3 for each in figures.values())
    assert figures["darkroom-scaled"].scale_out_s < 0.6 * figures["lru-scaled"].scale_out_s
    assert all(0 < each.up_share < 1 for each in figures.values())


def test_without_a_fleet_every_worker_is_up() -> None:
    figures, _ = replay("darkroom", compressed(generate(100, seed=1), 8.0), Settings(), seed=1)
    assert (figures.up_share, figures.scale_outs) == (1.0, 0)
