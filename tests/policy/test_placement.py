"""Which replica runs a node."""

import random
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from darkroom.policy.placement import ReplicaLoad, choose_replica
from tests.policy.trace import TraceEvent, check_trace, traces

IDS = [f"r{number}" for number in range(6)]
REPLICAS = st.lists(
    st.builds(
        ReplicaLoad,
        replica_id=st.sampled_from(IDS),
        running_count=st.integers(0, 3),
        holds_model=st.booleans(),
        is_suspect=st.booleans(),
    ),
    unique_by=lambda replica: replica.replica_id,
)
TRIED = st.sets(st.sampled_from(IDS))


def load(replica_id: str, running: int = 0, *, holds: bool = False, suspect: bool = False) -> ReplicaLoad:
    return ReplicaLoad(replica_id=replica_id, running_count=running, holds_model=holds, is_suspect=suspect)


def chosen(*replicas: ReplicaLoad, tried: tuple[str, ...] = ()) -> str | None:
    placement = choose_replica(replicas, tried=tried)
    return placement.replica_id if placement else None


def test_no_replica_is_no_placement() -> None:
    assert chosen() is None


def test_the_least_loaded_is_chosen() -> None:
    assert chosen(load("a", 2), load("b", 1), load("c", 3)) == "b"


def test_among_equal_loads_the_holder_of_the_model_is_chosen() -> None:
    assert chosen(load("a", 1), load("b", 1, holds=True)) == "b"


def test_a_lower_load_beats_holding_the_model() -> None:
    assert chosen(load("a", 2, holds=True), load("b", 1)) == "b"


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
    replicas: list[ReplicaLoad], tried: set[str]
) -> None:
    left = {replica.replica_id for replica in replicas} - tried
    placement = choose_replica(replicas, tried=tried)
    assert placement.replica_id in left if placement else not left


@given(REPLICAS)
def test_suspects_come_last(replicas: list[ReplicaLoad]) -> None:
    placement = choose_replica(replicas)
    suspects = {replica.replica_id for replica in replicas if replica.is_suspect}
    assert placement is None or placement.replica_id not in suspects or len(suspects) == len(replicas)


@given(REPLICAS)
def test_nobody_who_is_as_trustworthy_has_less_to_do(replicas: list[ReplicaLoad]) -> None:
    placement = choose_replica(replicas)
    if placement:
        best = next(replica for replica in replicas if replica.replica_id == placement.replica_id)
        peers = [replica for replica in replicas if replica.is_suspect == best.is_suspect]
        assert best.running_count == min(replica.running_count for replica in peers)


@given(REPLICAS, st.randoms(use_true_random=False))
def test_the_order_of_the_replicas_does_not_matter(replicas: list[ReplicaLoad], shuffler: random.Random) -> None:
    shuffled = list(replicas)
    shuffler.shuffle(shuffled)
    assert choose_replica(shuffled) == choose_replica(replicas)


def _replay(events: Iterator[TraceEvent]) -> Iterator[str]:
    replicas: dict[str, ReplicaLoad] = {}
    for event in events:
        named = event.named
        if event.verb == "replica":
            name = event.words[0]
            replicas[name] = load(name, int(named["running"]), holds="holds" in named, suspect="suspect" in named)
            continue
        placement = choose_replica(list(replicas.values()), tried=named.get("tried", "").split(","))
        yield f"{placement.replica_id}: {placement.reason}" if placement else "-"
