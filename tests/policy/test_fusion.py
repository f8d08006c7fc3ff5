"""Which pairs are kept merged, and what is known of their costs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from darkroom.policy.fusion import MOST_PAIRS, Pair, PairCosts, choose_fused


def pair(rate: float, *, adapter_s: float = 1.0, displaced_s: float = 0.0, **more: float) -> Pair:
    return Pair(rate=rate, adapter_s=adapter_s, displaced_s=displaced_s, **more)


def test_pairs_are_kept_by_what_they_save_less_what_they_push_out() -> None:
    pairs = {"a": pair(1.0), "b": pair(0.5, adapter_s=3.0), "c": pair(2.0, displaced_s=2.5), "d": pair(0.0)}
    assert choose_fused(pairs, frozenset()) == ["b", "a"]


def test_merging_has_to_earn_what_it_takes_once() -> None:
    assert choose_fused({"a": pair(0.01, make_s=5.0)}, frozenset()) == ["a"]
    assert choose_fused({"a": pair(0.01, make_s=7.0)}, frozenset()) == []


def test_one_that_is_merged_gives_way_only_to_one_better_by_a_margin() -> None:
    for rate, chosen in ((1.1, ["a"]), (1.3, ["b"])):
        assert choose_fused({"a": pair(1.0), "b": pair(rate)}, frozenset("a"), most=1) == chosen
    assert choose_fused({"a": pair(-1.0)}, frozenset("a")) == []


def test_what_does_not_fit_is_passed_over() -> None:
    pairs = {"a": pair(3.0, size_bytes=6), "b": pair(2.0, size_bytes=5), "c": pair(1.0, size_bytes=4)}
    assert choose_fused(pairs, frozenset(), room_bytes=10) == ["a", "c"]


@given(
    st.dictionaries(
        st.text("abcdef", min_size=1, max_size=3),
        st.tuples(st.floats(-2, 5), st.floats(-2, 5), st.floats(0, 3), st.integers(0, 10)),
        max_size=80,
    ),
    st.integers(0, MOST_PAIRS),
    st.floats(0, 100),
)
def test_the_bounds_hold_and_only_what_gains_is_kept(
    drawn: dict[str, tuple[float, float, float, int]], most: int, room_bytes: float
) -> None:
    pairs = {
        name: pair(rate, adapter_s=adapter_s, displaced_s=displaced_s, size_bytes=size)
        for name, (rate, adapter_s, displaced_s, size) in drawn.items()
    }
    chosen = choose_fused(pairs, frozenset(list(pairs)[::2]), most=most, room_bytes=room_bytes)
    assert len(set(chosen)) == len(chosen) <= most
    assert sum(pairs[name].size_bytes for name in chosen) <= room_bytes
    assert all(pairs[name].gain > 0 for name in chosen)
    again = choose_fused(pairs, frozenset(chosen), most=most, room_bytes=room_bytes)
    assert set(again) == set(chosen)


def test_a_pair_costs_what_its_requests_take_more_than_alone_without_adapters() -> None:
    costs = PairCosts()
    assert costs.adapter_s("a") == 0.0
    costs.add("a", 0.0, adapted_s=1.5, bare_s=1.0, is_merged=False)
    assert costs.adapter_s("a") == pytest.approx(0.5)
    costs.add("b", 0.0, adapted_s=0.6, bare_s=1.0, is_merged=False)  # it ran in company
    assert costs.adapter_s("b") < 0
    costs.add("c", 0.0, adapted_s=0.0, bare_s=0.0, is_merged=False)  # its LoRAs change nothing here
    assert costs.adapter_s("c") == 0.0
    assert sorted(costs.rates(0.0)) == ["a", "b", "c"]


def test_what_merged_requests_take_is_measured_and_longer_ones_save_more() -> None:
    costs = PairCosts()
    costs.add("a", 0.0, adapted_s=1.5, bare_s=1.0, is_merged=False)
    costs.add("a", 0.0, adapted_s=0.5, bare_s=1.0, is_merged=True)  # with others of its kind
    assert costs.adapter_s("a") == pytest.approx(1.0)
    for _ in range(60):
        costs.add("a", 0.0, adapted_s=1.5, bare_s=3.0, is_merged=True)
    assert costs.adapter_s("a") == pytest.approx(3.0, rel=0.01)
    for _ in range(60):
        costs.add("a", 0.0, adapted_s=0.3, bare_s=1.0, is_merged=False)
    assert costs.adapter_s("a") < 0


def test_now_and_then_a_request_of_a_merged_pair_runs_beside_the_base() -> None:
    costs = PairCosts()
    turns = [costs.takes_turn_beside("a") for _ in range(64)]
    assert 2 <= sum(turns) <= 8
    assert not any(turns[:8])


def test_what_was_asked_for_long_ago_is_forgotten() -> None:
    costs = PairCosts()
    costs.add("a", 0.0, adapted_s=1.5, bare_s=1.0, is_merged=False)
    assert costs.rates(60.0)["a"] > costs.rates(600.0)["a"] > 0
    assert costs.rates(12 * 3600.0) == {}
    assert costs.adapter_s("a") == 0.0


def test_however_many_pairs_are_asked_for_those_asked_for_most_are_remembered() -> None:
    costs = PairCosts()
    for number in range(3000):
        costs.add(f"once-{number}", float(number) / 100, adapted_s=1.5, bare_s=1.0, is_merged=False)
        costs.add("often", float(number) / 100, adapted_s=1.5, bare_s=1.0, is_merged=False)
    rates = costs.rates(30.0)
    assert len(rates) <= 1000
    assert max(rates, key=rates.__getitem__) == "often"
    assert costs.adapter_s("often") == pytest.approx(0.5)
