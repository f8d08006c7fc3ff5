"""The least time a mix of requests can take, from the UNet's cost curve alone. Pure: no clock, no I/O.

Every request needs as many forwards as it has steps, one after another; a batch takes at most one forward of each. With
a cost that grows ever more slowly, no schedule beats running, at each step, everything that is not done: n(t) requests
at step t, n(t) falling as the shorter ones end. Where the measured curve grows faster, `cheapest` splits a batch.
"""

import itertools
from collections.abc import Mapping, Sequence

ROWS_PER_REQUEST = 2
"""With and without the prompt: classifier-free guidance."""


def cheapest(forward_s: Mapping[int, float], request_count: int) -> list[float]:
    """Least seconds for one step of 0, 1, … `request_count` requests, in as many batches as it takes.

    `forward_s` has seconds of a forward by its rows; between the sizes measured the cost lies on a line.
    """
    whole = [0.0, *(_between(forward_s, ROWS_PER_REQUEST * count) for count in range(1, request_count + 1))]
    best = [0.0]
    for count in range(1, request_count + 1):
        best.append(min(whole[size] + best[count - size] for size in range(1, count + 1)))
    return best


def _between(forward_s: Mapping[int, float], rows: int) -> float:
    """The cost at `rows`; past the largest size measured there are no batches."""
    sizes = sorted(forward_s)
    if rows < sizes[0] or rows > sizes[-1]:
        return float("inf")
    below = max(size for size in sizes if size <= rows)
    above = min(size for size in sizes if size >= rows)
    if below == above:
        return forward_s[below]
    share = (rows - below) / (above - below)
    return forward_s[below] * (1 - share) + forward_s[above] * share


def replica_s(step_counts: Sequence[int], step_s: Sequence[float]) -> float:
    """Least seconds of one replica for requests of so many steps; `step_s` is what `cheapest` returned."""
    return sum(step_s[sum(count > step for count in step_counts)] for step in range(max(step_counts, default=0)))


def least_s(step_counts: Sequence[int], forward_s: Mapping[int, float], replica_count: int) -> float:
    """Least seconds until all requests are done, over every way to share them among one or two replicas.

    With more replicas, every second one: the longest requests are dealt out in turn, which is no longer proven least.
    """
    step_s = cheapest(forward_s, len(step_counts))
    ordered = sorted(step_counts, reverse=True)
    if replica_count == 1:
        return replica_s(ordered, step_s)
    if replica_count > 2:
        return max(replica_s(ordered[first::replica_count], step_s) for first in range(replica_count))
    best = float("inf")
    for sides in itertools.product((False, True), repeat=len(ordered) - 1):
        mine = [count for count, other in zip(ordered[1:], sides, strict=True) if not other]
        theirs = [count for count, other in zip(ordered[1:], sides, strict=True) if other]
        best = min(best, max(replica_s([ordered[0], *mine], step_s), replica_s(theirs, step_s)))
    return best
