"""Size classes of the host memory pool: by weighted k-means over the sizes of the files it is to hold.

Lin et al. (SoCC'25) use five classes by weighted k-means and publish neither features nor weights. Here the feature is
the logarithm of the size, so that what is minimised is the relative waste, and the weight what the caller says, such as
a file's load rate. In one dimension k-means has an exact solution, by dynamic programming (Wang and Song, 2011).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CLASS_COUNT = 5
_MAX_SIZES = 512
"""Distinct sizes that are told apart; more are merged with their larger neighbours."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class SizeClass:
    """Blocks of one size."""

    capacity_bytes: int
    """The largest size in the class: a block fits them all."""
    weight: float
    """Of all sizes in the class together."""


def size_classes(weights: Mapping[int, float], count: int = CLASS_COUNT) -> tuple[SizeClass, ...]:
    """At most `count` classes, smallest first, for files of these sizes; sizes of no weight count for nothing."""
    sizes = sorted(size for size, weight in weights.items() if size > 0 and weight > 0)
    merged = _merged(sizes, [weights[size] for size in sizes])
    if not merged:
        return ()
    capacities = [size for size, _ in merged]
    weight_of = np.array([weight for _, weight in merged], dtype=np.float64)
    ends = _partition(np.log(np.array(capacities, dtype=np.float64)), weight_of, min(count, len(merged)))
    starts = [0, *ends[:-1]]
    return tuple(
        SizeClass(capacities[end - 1], float(weight_of[start:end].sum()))
        for start, end in zip(starts, ends, strict=True)
    )


def class_for(size_bytes: int, classes: Sequence[SizeClass]) -> SizeClass | None:
    """The smallest class whose blocks hold so much; None if none does."""
    return next((chosen for chosen in classes if chosen.capacity_bytes >= size_bytes), None)


def block_counts(classes: Sequence[SizeClass], budget_bytes: int) -> tuple[int, ...]:
    """How many blocks of each class to make beforehand within the budget: one more of the class that lacks most.

    A class lacks most whose weight per block is highest. Ties go to the smaller class.
    """
    counts = [0] * len(classes)
    left_bytes = budget_bytes
    while True:
        fitting = [i for i, chosen in enumerate(classes) if chosen.capacity_bytes <= left_bytes]
        if not fitting:
            return tuple(counts)
        best = max(fitting, key=lambda i: (classes[i].weight / (counts[i] + 1), -i))
        counts[best] += 1
        left_bytes -= classes[best].capacity_bytes


def _merged(sizes: Sequence[int], weights: Sequence[float]) -> list[tuple[int, float]]:
    step = -(-len(sizes) // _MAX_SIZES) or 1
    groups = [range(start, min(start + step, len(sizes))) for start in range(0, len(sizes), step)]
    return [(sizes[group[-1]], sum(weights[i] for i in group)) for group in groups]


def _partition(values: Floats, weights: Floats, count: int) -> list[int]:
    """Ends of the consecutive groups of sorted values with the least weighted squared distance to their means."""
    total = np.concatenate(([0.0], np.cumsum(weights)))
    first = np.concatenate(([0.0], np.cumsum(weights * values)))
    second = np.concatenate(([0.0], np.cumsum(weights * values**2)))

    def cost(start: NDArray[np.intp], end: int) -> Floats:
        """Of a group from each of `start` to before `end`."""
        spread: Floats = second[end] - second[start] - (first[end] - first[start]) ** 2 / (total[end] - total[start])
        return spread

    n = len(values)
    best = np.full((count + 1, n + 1), np.inf)
    cut = np.zeros((count + 1, n + 1), dtype=np.intp)
    best[0, 0] = 0.0
    for groups in range(1, count + 1):
        for end in range(groups, n + 1):
            starts = np.arange(groups - 1, end)
            costs = best[groups - 1, starts] + cost(starts, end)
            chosen = int(np.argmin(costs))
            best[groups, end], cut[groups, end] = costs[chosen], starts[chosen]
    ends = [n]
    for groups in range(count, 1, -1):
        ends.append(int(cut[groups, ends[-1]]))
    return ends[::-1]
