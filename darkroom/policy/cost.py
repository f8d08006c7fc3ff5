"""Seconds of one forward by its rows, per kind of forward, learned from what ran. Pure: no clock, no I/O.

Whoever asks decides by it what is run, and so what is measured: a size believed too slow would never be tried again.
Hence sizes never measured are guessed cheap, and sizes not measured for long are forgotten.
"""

from bisect import bisect_left
from collections import OrderedDict, deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from statistics import median_low

_WEIGHT = 0.25
"""Of the newest sample in the average."""
_SAMPLE_COUNT = 3
"""Samples whose median enters the average: one hiccup among them does not count."""
_FORGOTTEN_AFTER = 512
"""Forwards of a kind after which a size that was not among them is forgotten."""
_FIXED_SHARE = 0.5
"""Share of a forward's time that is guessed not to grow with its rows while only one size is known."""


class CostCurve:
    """A piecewise linear curve for each kind of forward, through the averages of the sizes measured.

    Invariant: never decreasing in rows and never more than proportional to them. Both hold of any device, for a batch
    could be padded to the next size, or split; what samples say against them is noise.
    """

    def __init__(self, *, max_keys: int = 256) -> None:
        """`max_keys`: kinds remembered; past that, the one measured least recently is dropped."""
        if max_keys < 1:
            raise ValueError(f"max_keys must be at least 1, not {max_keys}")
        self._max_keys = max_keys
        self._kinds: OrderedDict[Hashable, _Kind] = OrderedDict()

    def add(self, key: Hashable, rows: int, seconds: float) -> None:
        """Notes that a forward of so many rows took so long."""
        if rows < 1:
            raise ValueError(f"rows must be at least 1, not {rows}")
        kind = self._kinds.get(key)
        if kind is None:
            kind = self._kinds[key] = _Kind()
            if len(self._kinds) > self._max_keys:
                self._kinds.popitem(last=False)
        self._kinds.move_to_end(key)
        kind.add(rows, seconds)

    def seconds(self, key: Hashable, rows: int) -> float | None:
        """Predicted seconds of a forward of `rows` rows; None when no forward of this kind has run."""
        kind = self._kinds.get(key)
        return kind.line().seconds(rows) if kind else None

    def is_known(self, key: Hashable) -> bool:
        """Whether a forward of this kind has run lately."""
        return key in self._kinds

    def measured(self, key: Hashable) -> dict[int, float]:
        """Seconds by rows at the sizes measured, as the curve has them; empty when nothing is known of the kind."""
        kind = self._kinds.get(key)
        return dict(zip(kind.line().rows, kind.line().costs_s, strict=True)) if kind else {}


@dataclass(slots=True)
class _Size:
    """What one size took: a running average of the median of the last few samples."""

    average_s: float
    last_s: deque[float]
    sample_count: int
    measured_at: int

    def add(self, seconds: float, at: int) -> None:
        self.last_s.append(seconds)
        self.sample_count += 1
        self.measured_at = at
        middle_s = median_low(self.last_s)
        is_young = self.sample_count <= _SAMPLE_COUNT
        self.average_s = middle_s if is_young else self.average_s + _WEIGHT * (middle_s - self.average_s)


@dataclass(frozen=True, slots=True)
class _Line:
    """The curve of one kind: straight between the sizes, and on beyond them."""

    rows: list[int]
    costs_s: list[float]

    def seconds(self, rows: int) -> float:
        if len(self.rows) == 1:
            return self.costs_s[0] * (_FIXED_SHARE + (1 - _FIXED_SHARE) * rows / self.rows[0])
        right = min(max(bisect_left(self.rows, rows), 1), len(self.rows) - 1)
        low, high = self.rows[right - 1], self.rows[right]
        low_s, high_s = self.costs_s[right - 1], self.costs_s[right]
        return low_s + (high_s - low_s) * (rows - low) / (high - low)


@dataclass(slots=True)
class _Kind:
    """The sizes of one kind of forward."""

    sizes: dict[int, _Size] = field(default_factory=dict)
    forward_count: int = 0
    drawn: _Line | None = None
    """The curve, until the next sample."""

    def add(self, rows: int, seconds: float) -> None:
        self.forward_count += 1
        self.drawn = None
        size = self.sizes.get(rows)
        if size:
            size.add(seconds, self.forward_count)
        else:
            self.sizes[rows] = _Size(seconds, deque([seconds], _SAMPLE_COUNT), 1, self.forward_count)
        if self.forward_count % _FORGOTTEN_AFTER == 0:
            oldest = self.forward_count - _FORGOTTEN_AFTER
            self.sizes = {rows: size for rows, size in self.sizes.items() if size.measured_at > oldest}

    def line(self) -> _Line:
        if self.drawn is None:
            # A size tried once may have been compiled or allocated for: until it is tried again it is guessed.
            rows = sorted(size for size, taken in self.sizes.items() if taken.sample_count > 1) or sorted(self.sizes)
            self.drawn = _Line(rows, _consistent([(size, self.sizes[size].average_s) for size in rows]))
        return self.drawn


def _consistent(points: list[tuple[int, float]]) -> list[float]:
    """The largest costs below the measured ones that never fall and never grow by more than the rows do."""
    costs_s = [cost_s for _, cost_s in points]
    for place in range(len(points) - 2, -1, -1):
        costs_s[place] = min(costs_s[place], costs_s[place + 1])
    for place in range(1, len(points)):
        costs_s[place] = min(costs_s[place], costs_s[place - 1] * points[place][0] / points[place - 1][0])
    return costs_s
