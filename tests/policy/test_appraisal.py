"""What tiers hold is worth to all the models that use it, here and as somebody says of the cluster."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from darkroom.policy.appraisal import Appraisal, Asked
from darkroom.policy.eviction import Resident
from darkroom.policy.pace import GUESSED, Pace
from darkroom.policy.popularity import Popularity
from darkroom.policy.worth import LoadTimes, Tier, Worth, WorthConfig

TIMES = LoadTimes(network_s=16.0, disk_s=6.0, bus_s=1.5)
NOW_S = 100.0


def appraisal(**asked: int) -> Appraisal:
    """Of models asked for so many times, a second apart, by requests of two seconds."""
    known = Appraisal(Worth(Popularity(), TIMES, WorthConfig()))
    for name, count in asked.items():
        for second in range(count):
            known.worth.add(name, float(second), run_s=2.0)
    return known


def value_s(known: Appraisal, *models: str, tier: Tier = Tier.HOST, now_s: float = NOW_S, size: float = 1.0) -> float:
    return known.value_s(Resident(name="x", size_bytes=size, used_s=0.0, models=models), tier, (), now_s)


def test_what_nobody_asked_for_is_worth_nothing() -> None:
    for tier in (Tier.DEVICE, Tier.HOST, Tier.DISK):
        assert value_s(appraisal(), "a", tier=tier) == 0.0
        assert value_s(appraisal(a=5), tier=tier) == 0.0


def test_a_component_is_worth_what_it_is_worth_to_all_that_use_it() -> None:
    known = appraisal(a=2, b=3)
    alone = value_s(known, "a"), value_s(known, "b")
    assert max(alone) < value_s(known, "a", "b") < sum(alone)


def test_two_models_asked_for_half_as_often_are_worth_what_one_is() -> None:
    known = appraisal()
    known.tell({name: Asked(rate=0.002, run_s=0.0) for name in "ab"} | {"c": Asked(rate=0.004, run_s=0.0)}, 200.0)
    assert value_s(known, "a", "b") == pytest.approx(value_s(known, "c"))


@given(st.lists(st.integers(0, 300), max_size=6))
def test_a_component_is_never_worth_more_than_its_load(counts: list[int]) -> None:
    names = "abcdef"[: len(counts)]
    known = appraisal(**dict(zip(names, counts, strict=True)))
    assert 0.0 <= value_s(known, *names, size=3.0) <= 3.0 * TIMES.disk_s + 1e-9


def test_what_is_said_of_the_cluster_counts_until_it_is_stale_and_for_the_models_it_names() -> None:
    known = appraisal(a=3)
    seen_s = value_s(known, "a")
    known.tell({"b": Asked(rate=1.0, run_s=2.0)}, 200.0)
    assert value_s(known, "b") > value_s(known, "a") == seen_s
    known.tell({"a": Asked(rate=1.0, run_s=2.0)}, 200.0)
    assert value_s(known, "a", now_s=199.0) > seen_s > value_s(known, "b", now_s=199.0) == 0.0
    assert 0.0 < value_s(known, "a", now_s=200.0) < seen_s


def test_requests_that_ran_here_count_before_anybody_says_so() -> None:
    known = appraisal(a=3)
    seen_s = value_s(known, "a")
    known.tell({"a": Asked(rate=0.0, run_s=0.0)}, 200.0)
    assert value_s(known, "a") >= seen_s


def test_copies_elsewhere_make_one_here_worth_less_on_their_tier() -> None:
    known = appraisal()
    values = []
    for others in ((0, 0, 0), (0, 1, 0), (0, 5, 0)):
        known.tell({"a": Asked(rate=0.01, run_s=20.0, others=others)}, 200.0)
        values.append(value_s(known, "a"))
        assert value_s(known, "a", tier=Tier.DISK) > 0.0
    assert values == sorted(values, reverse=True)
    assert values[2] < values[1] / 3 < values[0] / 3


def test_large_loads_tell_the_pace_and_tiny_ones_hardly_do() -> None:
    pace = Pace()
    assert pace.times == GUESSED
    pace.add(Tier.HOST, 1000, 0.01)
    assert pace.times.disk_s < 2 * GUESSED.disk_s
    for _ in range(3):
        pace.add(Tier.HOST, int(2e9), 4.0)
    assert pace.times.disk_s == pytest.approx(2e-9, rel=0.05)
    assert (pace.times.network_s, pace.times.bus_s) == (GUESSED.network_s, GUESSED.bus_s)
