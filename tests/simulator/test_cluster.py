"""Whole replays: by hand, by invariant, and every way to serve on the same requests."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from darkroom.cli import app
from simulator.baselines import Baseline, by_recency, least_loaded, locality
from simulator.cluster import Cluster, Hardware
from simulator.costs import DIRECT, FREE, PRODUCTION, Sizes
from simulator.generator import generate
from simulator.ours import Darkroom, DarkroomConfig
from simulator.report import measure, series, spread
from simulator.run import Settings, replay, workload
from simulator.systems import ABLATIONS, ADDITIONS, LIMITS, SYSTEMS
from simulator.worker import Job
from simulator.workload import LoraUse, Request, compressed

EQUAL = Sizes(0, spread=0.0, lora=0.0)
LOADS = replace(PRODUCTION, attach_s=4.4)


def ask(number: int, arrival_s: float, base: str, *loras: str) -> Request:
    return Request(
        number=number, arrival_s=arrival_s, base=base, loras=tuple(LoraUse(lora, 1.0) for lora in loras), step_count=30
    )


def run(service: Baseline | Darkroom, requests: Sequence[Request], workers: int = 1, sizes: Sizes = EQUAL) -> list[Job]:
    cluster = Cluster(service, Hardware(worker_count=workers), sizes, seed=0)
    return sorted(cluster.replay(requests), key=lambda job: job.request.number)


def latencies(jobs: Sequence[Job]) -> list[float]:
    return [job.finish_s - job.request.arrival_s for job in jobs]


def test_production_serves_turn_by_turn_loads_and_all() -> None:
    requests = [ask(0, 0, "a"), ask(1, 1, "b"), ask(2, 200, "a"), ask(3, 300, "a", "ink"), ask(4, 400, "a", "ink")]
    jobs = run(Baseline(least_loaded, by_recency, LOADS), requests)
    work_s = 4 + 30 * 0.11
    assert latencies(jobs) == pytest.approx([38 + work_s, 75 + 2 * work_s, 2.9 + work_s, 4.4 + work_s, work_s])


def test_locality_goes_where_the_model_is_and_elsewhere_when_that_is_sooner() -> None:
    requests = [ask(0, 0, "a"), ask(1, 100, "a"), *(ask(number, 200, "a") for number in range(2, 10))]
    jobs = run(Baseline(locality, by_recency, LOADS), requests, workers=2)
    assert jobs[1].worker_id == jobs[0].worker_id
    assert {job.worker_id for job in jobs[2:]} == {0, 1}


def test_darkroom_loads_beside_the_accelerator_and_each_component_once() -> None:
    requests = [ask(0, 0, "a"), ask(1, 30, "a"), ask(2, 30.5, "b"), ask(3, 31, "b")]
    service = Darkroom(DarkroomConfig(plan_every_s=0.0), requests)
    cluster = Cluster(service, Hardware(worker_count=1), EQUAL, seed=0)
    jobs = {job.request.number: job for job in cluster.replay(requests)}
    assert jobs[0].start_s == pytest.approx(16.1 + 1.5)
    assert jobs[2].start_s == pytest.approx(30.5 + 16.1 + 1.5)  # fetched while `a` ran
    assert cluster.workers[0].load_counts == [0, 0, 0, 2]


def test_whoever_comes_while_its_model_moves_to_the_device_waits_for_it() -> None:
    requests = [ask(0, 0, "a"), ask(1, 17, "a")]
    jobs = run(Darkroom(DarkroomConfig(plan_every_s=0.0, max_images=8), requests), requests)
    assert [job.start_s for job in jobs] == pytest.approx([17.6, 17.6])


def test_loras_share_the_network_and_each_is_fetched_once() -> None:
    sizes = Sizes(0, spread=0.0, lora=1.0)
    requests = [ask(0, 0, "a"), ask(1, 100, "a", "ink"), ask(2, 100, "a", "ink"), ask(3, 100, "a", "oil")]
    loader = replace(DIRECT, network_s=10.0, disk_s=2.0, attach_s=0.5)
    service = Darkroom(DarkroomConfig(loader=loader, plan_every_s=0.0, max_images=8), requests)
    cluster = Cluster(service, Hardware(worker_count=1), sizes, seed=0)
    jobs = {job.request.number: job for job in cluster.replay(requests)}
    both_fetched_s, both_read_s = 100 + 2 * 10.0, 2 * 2.0
    assert [jobs[number].start_s for number in (1, 2, 3)] == pytest.approx([both_fetched_s + both_read_s + 0.5] * 3)
    network = cluster.workers[0].network
    assert network is not None
    assert network.moved == pytest.approx(3.0)  # the base and two LoRAs


def test_a_model_that_was_pushed_out_comes_back_from_the_host() -> None:
    requests = [ask(0, 0, "a"), ask(1, 100, "b"), ask(2, 200, "a")]
    jobs = run(Darkroom(DarkroomConfig(plan_every_s=0.0), requests), requests)
    assert jobs[2].start_s == pytest.approx(201.5)


def test_where_loads_are_free_nobody_waits_but_for_the_accelerator() -> None:
    requests = [ask(0, 0, "a"), ask(1, 1, "b", "ink")]
    service = Darkroom(DarkroomConfig(loader=FREE, plan_every_s=0.0), requests)
    assert latencies(run(service, requests, workers=2)) == pytest.approx([7.3, 7.3])


REQUESTS = st.lists(
    st.tuples(st.floats(0, 60), st.sampled_from("abcdef"), st.sampled_from(["", "x", "y"]), st.integers(1, 8)),
    min_size=1,
    max_size=40,
)


@settings(max_examples=30, deadline=None)
@given(REQUESTS, st.sampled_from(["lru", "darkroom", "darkroom-batched", "oracle-locality"]), st.integers(1, 3))
def test_every_request_is_answered_once_and_no_tier_holds_too_much(
    drawn: list[tuple[float, str, str, int]], system: str, workers: int
) -> None:
    ordered = sorted(drawn)
    requests = [
        replace(ask(number, at_s, base, *filter(None, [lora])), image_count=images)
        for number, (at_s, base, lora, images) in enumerate(ordered)
    ]
    cluster = Cluster(SYSTEMS[system](requests), Hardware(worker_count=workers), Sizes(1), seed=1)
    jobs = cluster.replay(requests)
    assert sorted(job.request.number for job in jobs) == list(range(len(requests)))
    assert all(job.request.arrival_s <= job.start_s < job.finish_s for job in jobs)
    for worker in cluster.workers:
        for shelf in worker.shelves:
            assert sum(item.size for item in shelf.items.values()) <= shelf.room + 1e-6
            assert not any(item.use_count for item in shelf.items.values())


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_way_to_serve_runs_and_runs_the_same_again(system: str) -> None:
    requests = compressed(generate(250, seed=2), 8.0)
    setting = Settings()
    first, _ = replay(system, requests, setting, seed=2)
    assert first == replay(system, requests, setting, seed=2)[0]
    assert first.request_count == 250
    assert first.device_hits + first.host_hits + first.disk_hits + first.remote_hits == pytest.approx(1)


def test_darkroom_beats_production_and_nobody_beats_the_limit() -> None:
    setting = Settings(request_count=2500)
    requests = workload(setting, seed=1)
    means = {
        name: replay(name, requests, setting, seed=1)[0].mean_s
        for name in ("lru", "lru-locality", "darkroom", "all-warm")
    }
    assert means["lru"] > means["lru-locality"] > means["darkroom"] > means["all-warm"]


def test_where_models_have_their_own_workers_the_popular_ones_are_slower_and_with_darkroom_they_are_not() -> None:
    setting = Settings(request_count=800, compression=24.0)
    requests = workload(setting, seed=0)
    sticky, ours = (replay(name, requests, setting, seed=0)[0] for name in ("lru-homes", "darkroom"))
    assert sticky.hot_s > sticky.cold_s
    assert ours.hot_s < ours.cold_s
    assert ours.hot_s < sticky.hot_s / 3


def test_series_count_who_waits_and_spreads_have_intervals() -> None:
    requests = [ask(0, 0, "a"), ask(1, 1, "a")]
    cluster = Cluster(Baseline(least_loaded, by_recency, LOADS), Hardware(worker_count=1), EQUAL, seed=0)
    jobs = cluster.replay(requests)
    shown = series(jobs)
    assert max(shown.waiting) == 2
    assert shown.waiting[-1] == 0
    assert shown.replicas["a"][-1] in (0, 1)
    figures = measure(cluster, jobs)
    assert figures.network_loads == 1
    assert figures.queue == pytest.approx(figures.wait_s * 2 / max(job.finish_s for job in jobs))
    assert spread([1.0, 2.0, 3.0]).half == pytest.approx(4.30 / 3**0.5)
    assert spread([1.0]).half == 0


def test_ablations_and_limits_differ_from_the_whole() -> None:
    requests = compressed(generate(700, seed=4), 16.0)
    whole, _ = replay("darkroom", requests, Settings(), seed=4)
    for name in (*ABLATIONS, *ADDITIONS, *LIMITS):
        assert replay(name, requests, Settings(), seed=4)[0] != whole, name


def test_the_command_prints_a_table_and_writes_its_files(tmp_path: Path) -> None:
    written = tmp_path / "figures.json"
    options = ["--requests", "120", "--policy", "lru", "--policy", "darkroom", "--gpus", "4", "--json", str(written)]
    done = CliRunner().invoke(app, ["simulate", *options, "--seeds", "2", "--plots", str(tmp_path / "plots")])
    assert done.exit_code == 0, done.output
    assert "darkroom" in done.output
    assert "…" not in done.output
    assert "scale-out, s" in done.output
    assert '"network_loads"' in written.read_text()
    assert len(list((tmp_path / "plots").glob("*.png"))) == 5


def test_a_store_with_a_bound_makes_cold_models_wait_for_each_other() -> None:
    means = []
    for options in ([], ["--store-share", "0.5"]):
        done = CliRunner().invoke(app, ["simulate", "--requests", "60", "--policy", "lru", "--gpus", "8", *options])
        assert done.exit_code == 0, done.output
        means.append(float(re.search(r"mean ([0-9.]+) s", done.output)[1]))  # type: ignore[index]
    assert means[1] > 1.2 * means[0]


def test_the_table_of_many_policies_is_wider_than_the_terminal_and_whole() -> None:
    done = CliRunner().invoke(app, ["simulate", "--requests", "40", "--policy", "ablations", "--gpus", "4"])
    assert done.exit_code == 0, done.output
    (heads,) = (line for line in done.output.splitlines() if "on device" in line)
    assert "scale-out, s" in heads
    assert "…" not in done.output


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--policy", "best"], "best"),
        (["--shape", "flat"], "diurnal"),
        (["--trace", "nowhere.csv"], "nowhere.csv"),
        (["--gpus", "0"], "gpus"),
    ],
)
def test_wrong_options_are_refused_by_name(options: list[str], said: str) -> None:
    done = CliRunner().invoke(app, ["simulate", "--requests", "10", *options])
    assert done.exit_code == 2
    assert said in done.output
