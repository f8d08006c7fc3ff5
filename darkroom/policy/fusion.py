"""Which pairs of base and LoRAs are kept merged, so that their requests need no adapter. Pure: no clock, no I/O.

SoCC'25 keeps the 50 most frequent; how it values them is not published. Here a pair is worth what its requests lose to
the adapter, less what merging takes and what a second copy of the base pushes out.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from darkroom.policy.popularity import Popularity

MOST_PAIRS = 50
GUESSED_RATIO = 1.1
"""What forwards with adapters take, by those without, while these were never measured."""
_PAYBACK_S = 600.0
"""Within which merging has to earn the seconds that it takes."""
_WINDOWS_S = (300.0, 3600.0)
"""Time constants of the rates: what was asked for half a day ago is not worth keeping merged."""
_WEIGHT = 0.2
"""Of the newest request in a pair's means."""
_TURNS = 16
"""Of a merged pair's requests, one in so many runs beside the base: what that takes changes with the company there."""
_MOST_KNOWN = 1000
"""Pairs that are remembered; scales are numbers, so that users could name any count of pairs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A base with LoRAs at their scales."""

    rate: float
    """Requests per second."""
    adapter_s: float
    """What the adapter costs each: its load, and its part of every step."""
    displaced_s: float
    """What requests for other models lose, per second, by the room that the merged copy takes."""
    make_s: float = 0.0
    """What merging takes, once; none for a pair that is merged."""
    size_bytes: float = 0.0
    """What the merged copy takes."""

    @property
    def gain(self) -> float:
        """Seconds saved per second."""
        return self.rate * self.adapter_s - self.displaced_s - self.make_s / _PAYBACK_S


def choose_fused(
    pairs: Mapping[str, Pair],
    kept: frozenset[str],
    *,
    most: int = MOST_PAIRS,
    margin: float = 1.2,
    room_bytes: float = math.inf,
) -> list[str]:
    """The pairs worth keeping merged, the best first, as far as there is room; those that do not fit are passed over.

    One that is merged already stays until a margin worse.
    """
    gains = {name: pair.gain * (margin if name in kept and pair.gain > 0 else 1.0) for name, pair in pairs.items()}
    chosen: list[str] = []
    for name in sorted((name for name, gain in gains.items() if gain > 0), key=lambda name: (-gains[name], name)):
        if len(chosen) < most and pairs[name].size_bytes <= room_bytes:
            chosen.append(name)
            room_bytes -= pairs[name].size_bytes
    return chosen


@dataclass(slots=True)
class _Seen:
    """Means over a pair's requests. Ratios are to a request of the same forwards by itself without adapters."""

    bare_s: float | None = None
    beside: float | None = None
    merged: float | None = None
    turn: int = 0


class PairCosts:
    """How often pairs are asked for, and what their requests take beside the base and merged.

    Beside the base they share batches with everybody, merged with their like alone: which costs less depends on how
    much else is going on, and is measured, not assumed.
    """

    def __init__(self) -> None:
        self._asked = Popularity(_WINDOWS_S)
        self._seen: dict[str, _Seen] = {}

    def add(self, name: str, now_s: float, *, adapted_s: float, bare_s: float, is_merged: bool) -> None:
        """Notes a request of a pair: what it took of the device, and would have by itself without adapters."""
        self._asked.add(name, now_s)
        seen = self._seen.setdefault(name, _Seen())
        if bare_s > 0:
            seen.bare_s = _mean(seen.bare_s, bare_s)
            if is_merged:
                seen.merged = _mean(seen.merged, adapted_s / bare_s)
            else:
                seen.beside = _mean(seen.beside, adapted_s / bare_s)
        if len(self._seen) > _MOST_KNOWN:
            self._forget_half(now_s)

    def takes_turn_beside(self, name: str) -> bool:
        """Counts a request of a merged pair. Whether it is one of those that run beside the base all the same."""
        seen = self._seen.setdefault(name, _Seen())
        seen.turn = (seen.turn + 1) % _TURNS
        return seen.turn == 0

    def rates(self, now_s: float) -> dict[str, float]:
        """Requests per second, of all pairs that are not forgotten."""
        rates = self._asked.rates(now_s)
        self._seen = {name: seen for name, seen in self._seen.items() if name in rates}
        return rates

    def adapter_s(self, name: str) -> float:
        """Seconds that a request of a pair takes less if it is merged; until one was, it is taken to run by itself."""
        seen = self._seen.get(name)
        if seen is None or seen.bare_s is None or seen.beside is None:
            return 0.0
        return (seen.beside - (1.0 if seen.merged is None else seen.merged)) * seen.bare_s

    def _forget_half(self, now_s: float) -> None:
        """Of the pairs, those asked for least."""
        rates, counts = self.rates(now_s), self._asked.counts(now_s)
        kept = sorted(rates, key=lambda name: (-rates[name], name))[: _MOST_KNOWN // 2]
        self._asked = Popularity(_WINDOWS_S)
        self._asked.restore({name: counts[name] for name in kept}, now_s)
        self._seen = {name: self._seen[name] for name in kept}


def _mean(before: float | None, newest: float) -> float:
    return newest if before is None else before + _WEIGHT * (newest - before)
