"""Which replica runs a node."""

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from darkroom.policy.forecast import Expected, Forecast
from darkroom.policy.placement import Candidate, choose_replica
from tests.policy.trace import TraceEvent, check_trace, traces

IDS = [f"r{number}" for number in range(6)]
REPLICAS = st.lists(
    st.builds(
        Candidate,
        replica_id=st.sampled_from(IDS),
        queue_s=st.integers(0, 3).map(float),
        prepare_s=st.integers(0, 3).map(float),
        swap_s=st.integers(0, 1).map(float),
        displaced_s=st.integers(0, 1).map(float),
        is_suspect=st.booleans(),
    ),
    unique_by=lambda replica: replica.replica_id,
)
TRIED = st.sets(st.sampled_from(IDS))


def load(replica_id: str, running: int = 0, *, holds: bool = False, suspect: bool = False) -> Candidate:
    """Of requests that take a second each, and a model of no size: its load takes 0.3 s."""
    expected = Expected(replica_id=replica_id, running_count=running, holds_model=holds, is_suspect=suspect)
    return Forecast().candidate(expected, "denoiser", "sd", work=1.0, size_bytes=0)


def chosen(*replicas: Candidate, tried: tuple[str, ...] = ()) -> str | None:
    placement = choose_replica(replicas, tried=tried)
    return placement.replica_id if placement else None


def test_no_replica_is_no_placement() -> None:
    assert chosen() is None


def test_the_least_loaded_is_chosen() -> None:
    assert chosen(load("a", 2), load("b", 1), load("c", 3)) == "b"


def test_among_equal_loads_the_holder_of_the_model_is_chosen() -> None:
    assert chosen(load("a", 1), load("b", 1, holds=True)) == "b"


def test_the_holder_is_chosen_until_its_queue_is_longer_than_the_load() -> None:
    assert chosen(load("a", 1, holds=True), load("b", 1)) == "a"
    assert chosen(load("a", 2, holds=True), load("b", 0)) == "b"


def test_what_a_load_pushes_out_counts() -> None:
    idle, holder = Candidate(replica_id="a", swap_s=1.0, displaced_s=5.0), Candidate(replica_id="b", queue_s=4.0)
    assert chosen(idle, holder) == "b"
    assert chosen(replace(idle, displaced_s=2.0), holder) == "a"


def test_loads_run_beside_the_queue() -> None:
    one = Candidate(replica_id="a", queue_s=5.0, prepare_s=4.0, swap_s=1.0, run_s=10.0)
    assert one.finish_s == 16.0


def test_runs_and_loads_are_learned_from_requests_that_were_alone() -> None:
    forecast = Forecast()
    assert forecast.load_s("vae", "sd", 500_000_000) == pytest.approx(1.3)
    forecast.add("vae", "sd", 2.0, 99.0, held=False)  # nobody knows yet what of it was the load
    forecast.add("vae", "sd", 2.0, 6.0, held=True)
    assert forecast.run_s("vae", "sd", 1.0) == 3.0
    assert forecast.run_s("vae", "other", 1.0) == 3.0
    assert forecast.run_s("encoder", "sd", 1.0) == 1.0
    forecast.add("vae", "sd", 2.0, 26.0, held=False)
    assert forecast.load_s("vae", "sd", 500_000_000) == 20.0


def test_equals_are_told_apart_by_id() -> None:
    assert chosen(load("c"), load("a"), load("b")) == "a"


def test_a_suspect_is_chosen_only_when_nobody_else_is_left() -> None:
    assert chosen(load("a", suspect=True), load("b", 9)) == "b"
    assert chosen(load("a", suspect=True), load("b", 9), tried=("b",)) == "a"


def test_when_all_were_tried_there_is_no_placement() -> None:
    assert chosen(load("a"), load("b"), tried=("a", "b")) is None


@pytest.mark.parametrize("name", traces("placement"))
def test_the_golden_trace_is_followed(name: str) -> None:
    check_trace(name, _replay)


@given(REPLICAS, TRIED)
def test_a_replica_is_found_whenever_one_is_left_and_never_among_the_tried(
    replicas: list[Candidate], tried: set[str]
) -> None:
    left = {replica.replica_id for replica in replicas} - tried
    placement = choose_replica(replicas, tried=tried)
    assert placement.replica_id in left if placement else not left


@given(REPLICAS)
def test_suspects_come_last(replicas: list[Candidate]) -> None:
    placement = choose_replica(replicas)
    suspects = {replica.replica_id for replica in replicas if replica.is_suspect}
    assert placement is None or placement.replica_id not in suspects or len(suspects) == len(replicas)


@given(REPLICAS)
def test_nobody_who_is_as_trustworthy_is_done_sooner(replicas: list[Candidate]) -> None:
    placement = choose_replica(replicas)
    if placement:
        best = next(replica for replica in replicas if replica.replica_id == placement.replica_id)
        peers = [replica for replica in replicas if replica.is_suspect == best.is_suspect]
        assert best.finish_s + best.displaced_s == min(peer.finish_s + peer.displaced_s for peer in peers)


@given(REPLICAS, st.randoms(use_true_random=False))
def test_the_order_of_the_replicas_does_not_matter(replicas: list[Candidate], shuffler: random.Random) -> None:
    shuffled = list(replicas)
    shuffler.shuffle(shuffled)
    assert choose_replica(shuffled) == choose_replica(replicas)


def _replay(events: Iterator[TraceEvent]) -> Iterator[str]:
    replicas: dict[str, Candidate] = {}
    for event in events:
        named = event.named
        if event.verb == "replica":
            name = event.words[0]
            replicas[name] = load(name, int(named["running"]), holds="holds" in named, suspect="suspect" in named)
            continue
        placement = choose_replica(list(replicas.values()), tried=named.get("tried", "").split(","))
        yield f"{placement.replica_id}: {placement.reason}" if placement else "-"
