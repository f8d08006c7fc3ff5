"""Seconds of a forward by its rows."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from darkroom.policy.cost import CostCurve

SAMPLES = st.lists(st.tuples(st.integers(1, 32), st.floats(0.001, 10.0)), min_size=1, max_size=40)


def curve(*samples: tuple[int, float], times: int = 3) -> CostCurve:
    costs = CostCurve()
    for rows, seconds in samples:
        for _ in range(times):
            costs.add("unet", rows, seconds)
    return costs


def test_nothing_is_known_of_a_kind_that_never_ran() -> None:
    costs = curve((2, 1.0))
    assert costs.seconds("vae", 2) is None
    assert not costs.is_known("vae")
    assert costs.measured("vae") == {}


def test_what_was_measured_is_predicted() -> None:
    costs = curve((2, 0.009), (8, 0.018))
    assert costs.measured("unet") == {2: 0.009, 8: 0.018}
    assert costs.seconds("unet", 8) == pytest.approx(0.018)


def test_between_two_sizes_and_beyond_them_the_cost_lies_on_their_line() -> None:
    costs = curve((2, 0.009), (8, 0.018))
    assert [costs.seconds("unet", rows) for rows in (1, 4, 16)] == pytest.approx([0.0075, 0.012, 0.030])


def test_while_one_size_is_known_a_larger_one_is_guessed_cheap_enough_to_be_tried() -> None:
    predicted = curve((2, 1.0)).seconds("unet", 4)
    assert predicted is not None
    assert 1.0 < predicted < 2.0


def test_a_slow_first_call_leaves_no_trace() -> None:
    costs = curve((2, 60.0), times=1)
    for _ in range(2):
        costs.add("unet", 2, 0.01)
    assert costs.seconds("unet", 2) == pytest.approx(0.01)


def test_a_size_whose_only_call_was_slow_is_tried_again() -> None:
    costs = curve((2, 0.010))
    costs.add("unet", 4, 60.0)
    predicted = costs.seconds("unet", 4)
    assert predicted is not None
    assert predicted < 2 * 0.010


def test_a_hiccup_does_not_count() -> None:
    costs = curve((2, 0.01), times=10)
    costs.add("unet", 2, 5.0)
    assert costs.seconds("unet", 2) == pytest.approx(0.01)


def test_a_lasting_change_is_followed() -> None:
    costs = curve((2, 0.01), times=50)
    for _ in range(20):
        costs.add("unet", 2, 0.03)
    assert costs.seconds("unet", 2) == pytest.approx(0.03, rel=0.02)


def test_a_size_not_measured_for_long_is_forgotten_and_so_guessed_anew() -> None:
    costs = curve((2, 0.01), (4, 0.02))
    for _ in range(1100):
        costs.add("unet", 2, 0.01)
    assert set(costs.measured("unet")) == {2}
    predicted = costs.seconds("unet", 4)
    assert predicted is not None
    assert predicted < 0.02


def test_the_kind_measured_least_recently_makes_room() -> None:
    costs = CostCurve(max_keys=2)
    for key in ("a", "b", "a", "c"):
        costs.add(key, 1, 1.0)
    assert [key for key in "abc" if costs.is_known(key)] == ["a", "c"]


def test_noise_averages_out() -> None:
    rng = random.Random(0)
    costs = CostCurve()
    for _ in range(300):
        for rows in (1, 2, 4, 8):
            costs.add("unet", rows, (0.006 + 0.0015 * rows) * rng.lognormvariate(0, 0.1))
    for rows in range(1, 17):
        assert costs.seconds("unet", rows) == pytest.approx(0.006 + 0.0015 * rows, rel=0.15)


@pytest.mark.parametrize("rows", [0, -1])
def test_a_forward_has_rows(rows: int) -> None:
    with pytest.raises(ValueError, match="rows must be at least 1"):
        CostCurve().add("unet", rows, 1.0)


def test_at_least_one_kind_is_remembered() -> None:
    with pytest.raises(ValueError, match="max_keys must be at least 1"):
        CostCurve(max_keys=0)


@settings(max_examples=30, deadline=None)
@given(SAMPLES)
def test_more_rows_never_cost_less_nor_more_than_in_proportion(samples: list[tuple[int, float]]) -> None:
    costs = curve(*samples, times=2)
    predicted = [costs.seconds("unet", rows) or 0.0 for rows in range(1, 80)]
    for rows, (fewer_s, more_s) in enumerate(itertools.pairwise(predicted), start=1):
        assert 0.0 < fewer_s <= more_s * (1 + 1e-9)
        assert more_s / (rows + 1) <= fewer_s / rows * (1 + 1e-9)


@settings(max_examples=30, deadline=None)
@given(SAMPLES)
def test_no_prediction_exceeds_what_was_measured_at_that_size(samples: list[tuple[int, float]]) -> None:
    costs = curve(*samples, times=2)
    for rows in {rows for rows, _ in samples}:
        slowest_s = max(seconds for size, seconds in samples if size == rows)
        assert (costs.seconds("unet", rows) or 0.0) <= slowest_s * (1 + 1e-9)
