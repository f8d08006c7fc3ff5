"""Which replica runs a node."""

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from darkroom.policy.forecast import Expected, Forecast, Wanted
from darkroom.policy.placement import Candidate, choose_replica
from darkroom.policy.worth import Tier
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


def wanted(model_id: str = "sd", stage: str = "vae", work: float = 1.0, size_bytes: float = 1e9) -> Wanted:
    return Wanted(stage=stage, model_id=model_id, work=work, size_bytes=size_bytes)


def load(replica_id: str, running: int = 0, *, holds: bool = False, suspect: bool = False) -> Candidate:
    """Of requests that take a second each, and a model of no size: its load takes 0.3 s, from who knows where."""
    expected = Expected(
        replica_id=replica_id, running_count=running, tier=Tier.DEVICE if holds else None, is_suspect=suspect
    )
    return Forecast().candidate(expected, wanted(size_bytes=0.0))


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
    forecast, twice = Forecast(), wanted(work=2.0)
    assert forecast.load_s(twice, None) == pytest.approx(2.3)
    forecast.add(twice, 99.0, None)  # nobody knows yet what of it was the load
    forecast.add(twice, 6.0, Tier.DEVICE)
    assert forecast.run_s(wanted()) == 3.0
    assert forecast.run_s(wanted("other")) == 3.0
    assert forecast.run_s(wanted(stage="encoder")) == 1.0
    forecast.add(twice, 26.0, None)
    assert forecast.load_s(twice, None) == 20.0


def test_of_loads_nobody_has_seen_the_nearer_take_less() -> None:
    loads = [Forecast().load_s(wanted(), tier) for tier in Tier]
    assert loads == pytest.approx([0.0, 0.3 + 0.1, 0.3 + 2.0, 0.3 + 4.0])
    assert Forecast().load_s(wanted(), None) == loads[Tier.DISK]


def seen(*loads: tuple[Tier, float]) -> Forecast:
    forecast = Forecast()
    forecast.add(wanted(), 1.0, Tier.DEVICE)
    for tier, load_s in loads:
        forecast.add(wanted(), 1.0 + load_s, tier)
    return forecast


def test_loads_are_learned_by_the_tier_they_come_from() -> None:
    forecast = seen((Tier.HOST, 2.0), (Tier.DISK, 5.0))
    assert [forecast.load_s(wanted(), tier) for tier in (Tier.HOST, Tier.DISK)] == [2.0, 5.0]
    assert forecast.load_s(wanted("other"), Tier.DISK) == pytest.approx(2.3)


@pytest.mark.parametrize("tier", [Tier.HOST, Tier.DISK, Tier.REMOTE])
@pytest.mark.parametrize("load_s", [0.01, 50.0])
def test_a_load_from_one_tier_puts_none_before_a_nearer_one(tier: Tier, load_s: float) -> None:
    forecast = seen((tier, load_s))
    loads = [forecast.load_s(wanted(), each) for each in Tier]
    assert loads == sorted(loads)
    assert len(set(loads)) == len(loads)


def test_bytes_come_to_host_memory_beside_the_queue_and_then_to_the_device() -> None:
    forecast = seen((Tier.HOST, 2.0), (Tier.DISK, 5.0))
    disk, host, unknown = (
        forecast.candidate(Expected(replica_id="a", running_count=8, tier=tier, is_suspect=False), wanted())
        for tier in (Tier.DISK, Tier.HOST, None)
    )
    assert (disk.prepare_s, disk.swap_s, disk.finish_s) == (3.0, 2.0, 4.0 + 2.0 + 1.0)
    assert (host.prepare_s, host.swap_s) == (0.0, 2.0)
    assert (unknown.prepare_s, unknown.swap_s) == pytest.approx((2.3, 0.0)), "as far as anybody can tell"


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
