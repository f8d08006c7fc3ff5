"""What lies in a tier of bounded size, and what leaves it when room is needed. Pure."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Resident:
    """Something that a tier holds and may drop."""

    name: str
    size_bytes: int
    load_s: float
    """What bringing it back takes, in seconds."""
    last_use_s: float
    """On the clock of the tier."""


Evict = Callable[[Sequence[Resident], int, float], Sequence[str]]
"""Of residents, bytes that are needed and the time now: names to drop, in this order, until there is room."""


def least_recently_used(residents: Sequence[Resident], needed_bytes: int, now_s: float) -> list[str]:
    """Drops what was used longest ago; of those used at one time, by name."""
    del now_s
    chosen: list[str] = []
    for resident in sorted(residents, key=lambda r: (r.last_use_s, r.name)):
        if needed_bytes <= 0:
            break
        chosen.append(resident.name)
        needed_bytes -= resident.size_bytes
    return chosen
