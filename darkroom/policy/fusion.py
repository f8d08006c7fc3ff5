"""Which pairs of base and LoRAs are kept merged, so that their requests need no adapter. Pure: no clock, no I/O.

SoCC'25 keeps the 50 most frequent; how it values them is not published. Here a pair is worth what its requests lose to
the adapter, less what a second copy of the base pushes out.
"""

from collections.abc import Mapping
from dataclasses import dataclass

MOST_PAIRS = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A base with LoRAs at their scales."""

    rate: float
    """Requests per second."""
    adapter_s: float
    """What the adapter costs each: its load, and its part of every step."""
    displaced_s: float
    """What requests for other models lose, per second, by the room that the merged copy takes."""

    @property
    def gain(self) -> float:
        """Seconds saved per second."""
        return self.rate * self.adapter_s - self.displaced_s


def choose_fused(
    pairs: Mapping[str, Pair], kept: frozenset[str], *, most: int = MOST_PAIRS, margin: float = 1.2
) -> list[str]:
    """The pairs worth keeping merged, the best first. One that is merged already stays until a margin worse."""
    gains = {name: pair.gain * (margin if name in kept and pair.gain > 0 else 1.0) for name, pair in pairs.items()}
    return sorted((name for name, gain in gains.items() if gain > 0), key=lambda name: (-gains[name], name))[:most]
