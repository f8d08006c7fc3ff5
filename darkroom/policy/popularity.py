"""How often each thing is asked for, lately and in the long run. Pure: no clock, no I/O.

SoCC'25 sorts models into hot (the top 5 %), warm (5 to 30 %) and cold; how it measures popularity is not published.
Here a rate is the mean of several decayed counts, over minutes and over hours: requests come in bursts of one user,
and models stay popular for days.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum

WINDOWS_S = (300.0, 3600.0, 43200.0)
"""Time constants of the decayed counts."""
_HOT_SHARE, _WARM_SHARE = 0.05, 0.30
_FORGOTTEN = 1e-4
"""Decayed requests in the longest window below which a thing is forgotten."""


class Band(Enum):
    """How popular a thing is among the others."""

    HOT = "hot"
    WARM = "warm"
    COLD = "cold"


class Popularity:
    """Decayed request rates by name."""

    def __init__(self, windows_s: Sequence[float] = WINDOWS_S) -> None:
        """`windows_s`: time constants, the shortest first."""
        if not windows_s or min(windows_s) <= 0:
            raise ValueError(f"windows_s must be positive, not {list(windows_s)}")
        self._windows_s = tuple(windows_s)
        self._counts: dict[str, list[float]] = {}
        self._noted_s: dict[str, float] = {}
        self._known: dict[str, tuple[float, tuple[float, float]]] = {}
        """When each was asked about last, and the answer: a plan asks for each many times."""

    def add(self, name: str, now_s: float, count: float = 1.0) -> None:
        """Notes requests for a thing."""
        decayed = self._decayed(name, now_s)
        self._counts[name] = [value + count for value in decayed]
        self._noted_s[name] = now_s
        self._known.pop(name, None)

    def rate(self, name: str, now_s: float) -> float:
        """Requests per second, expected from now on."""
        return self._rates_now(name, now_s)[0]

    def recent_rate(self, name: str, now_s: float) -> float:
        """The same, or the last minutes' where that is less: what is over counts for nothing, a burst for no more."""
        return self._rates_now(name, now_s)[1]

    def rates(self, now_s: float) -> dict[str, float]:
        """Of everything that was asked for, by name; what has faded away is forgotten."""
        for name in [n for n in self._counts if self._decayed(n, now_s)[-1] < _FORGOTTEN]:
            del self._counts[name], self._noted_s[name]
            self._known.pop(name, None)
        return {name: self.rate(name, now_s) for name in sorted(self._counts)}

    def counts(self, now_s: float) -> dict[str, tuple[float, ...]]:
        """The decayed counts as they are now, by name: all there is to know, for `restore`."""
        return {name: tuple(self._decayed(name, now_s)) for name in self.rates(now_s)}

    def restore(self, counts: Mapping[str, Sequence[float]], then_s: float) -> None:
        """Takes over what `counts` gave at a time, of things that nothing is known about yet."""
        for name, values in counts.items():
            if name not in self._counts and len(values) == len(self._windows_s):
                self._counts[name], self._noted_s[name] = list(values), then_s

    def bands(self, now_s: float) -> dict[str, Band]:
        """The band of each thing asked for: by rank, at least one is hot."""
        rates = self.rates(now_s)
        ranked = sorted(rates, key=lambda name: (-rates[name], name))
        hot, warm = math.ceil(_HOT_SHARE * len(ranked)), math.ceil(_WARM_SHARE * len(ranked))
        return {
            name: Band.HOT if place < hot else Band.WARM if place < warm else Band.COLD
            for place, name in enumerate(ranked)
        }

    def _rates_now(self, name: str, now_s: float) -> tuple[float, float]:
        """`rate` and `recent_rate`."""
        if name not in self._counts:
            return 0.0, 0.0
        known = self._known.get(name)
        if known is None or known[0] != now_s:
            counts = zip(self._decayed(name, now_s), self._windows_s, strict=True)
            rates = [count / window_s for count, window_s in counts]
            mean = sum(rates) / len(rates)
            known = self._known[name] = (now_s, (mean, min(rates[0], mean)))
        return known[1]

    def _decayed(self, name: str, now_s: float) -> list[float]:
        counts = self._counts.get(name)
        if counts is None:
            return [0.0] * len(self._windows_s)
        passed_s = max(now_s - self._noted_s[name], 0.0)
        return [c * math.exp(-passed_s / w) for c, w in zip(counts, self._windows_s, strict=True)]


def gini(values: Iterable[float]) -> float:
    """How unequal values are: 0 where all are equal, towards 1 where one has all. 0 for none."""
    ascending = sorted(values)
    total, count = sum(ascending), len(ascending)
    if not total:
        return 0.0
    ranked = sum(rank * value for rank, value in enumerate(ascending, start=1))
    return 2 * ranked / (count * total) - (count + 1) / count
