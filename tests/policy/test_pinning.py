"""Size classes: exact where it can be seen by eye, and never worse than any other division."""

import itertools
import math

from hypothesis import given, settings
from hypothesis import strategies as st

from darkroom.policy.pinning import SizeClass, block_counts, class_for, size_classes

_MB = 1_000_000


def test_groups_that_lie_apart_become_classes() -> None:
    sizes = {100 * _MB: 5.0, 110 * _MB: 5.0, 330 * _MB: 2.0, 1600 * _MB: 1.0, 1700 * _MB: 1.0, 5000 * _MB: 0.5}
    classes = size_classes(sizes, 4)
    assert [c.capacity_bytes // _MB for c in classes] == [110, 330, 1700, 5000]
    assert [c.weight for c in classes] == [10.0, 2.0, 2.0, 0.5]


def test_fewer_sizes_than_classes_get_one_each() -> None:
    assert [c.capacity_bytes for c in size_classes({7: 1.0, 9: 1.0, 8: 0.0})] == [7, 9]
    assert size_classes({}) == ()


def test_a_file_goes_into_the_smallest_class_that_holds_it() -> None:
    classes = (SizeClass(10, 1.0), SizeClass(20, 1.0))
    assert class_for(10, classes) == classes[0]
    assert class_for(11, classes) == classes[1]
    assert class_for(21, classes) is None


def test_blocks_are_made_where_they_are_wanted_within_the_budget() -> None:
    classes = (SizeClass(100, 6.0), SizeClass(1000, 2.0))
    assert block_counts(classes, 1400) == (4, 1)
    assert block_counts(classes, 99) == (0, 0)
    assert block_counts((), 1000) == ()


def _cost(groups: list[list[tuple[int, float]]]) -> float:
    total = 0.0
    for group in groups:
        weight = sum(w for _, w in group)
        mean = sum(math.log(s) * w for s, w in group) / weight
        total += sum(w * (math.log(s) - mean) ** 2 for s, w in group)
    return total


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(st.integers(1, 1 << 40), st.floats(0.1, 10), min_size=1, max_size=7), st.integers(1, 4))
def test_no_other_division_is_better(weights: dict[int, float], count: int) -> None:
    sizes = sorted(weights.items())
    classes = size_classes(weights, count)
    ends = [next(i for i, (s, _) in enumerate(sizes) if s == c.capacity_bytes) + 1 for c in classes]
    ours = _cost([sizes[a:b] for a, b in itertools.pairwise([0, *ends])])
    for cuts in itertools.combinations(range(1, len(sizes)), min(count, len(sizes)) - 1):
        assert ours <= _cost([sizes[a:b] for a, b in itertools.pairwise([0, *cuts, len(sizes)])]) + 1e-9


@settings(deadline=None, max_examples=20)
@given(st.dictionaries(st.integers(1, 1 << 40), st.floats(0.1, 10), min_size=1, max_size=900))
def test_every_file_has_a_class(weights: dict[int, float]) -> None:
    classes = size_classes(weights)
    assert len(classes) <= 5
    assert all(class_for(size, classes) for size in weights)
    assert math.isclose(sum(c.weight for c in classes), sum(weights.values()))
