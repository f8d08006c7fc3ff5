"""What leaves a tier that is full: a node's disk, its host memory, a device, and the simulator's alike.

Pure: no clock, no I/O.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Resident:
    """Something that a tier holds and may drop."""

    name: str
    """Of its own in the tier."""
    size_bytes: float
    used_s: float
    """When it was last used, on the clock of the tier."""
    models: tuple[str, ...] = ()
    """Ids of the models that use it."""
    value_s: float = 0.0
    """Seconds that requests would lose without it."""


Evict = Callable[[Sequence[Resident], float], list[str]]
"""Of what may go: names that go, the first first, so that so many bytes are free; all of them if that is not enough."""


def least_valuable(residents: Sequence[Resident], needed_bytes: float) -> list[str]:
    """By value per byte, what was not used for longest first among equals; then nothing goes that need not.

    Dropping in this order may free far too much at the end, as when a small thing goes before a large one: what the
    later ones make superfluous stays.
    """
    ordered = sorted(residents, key=lambda r: (r.value_s / r.size_bytes if r.size_bytes else 0.0, r.used_s, r.name))
    going = enough(ordered, needed_bytes)
    spare = sum(r.size_bytes for r in going) - needed_bytes
    for resident in sorted(going, key=lambda r: (-r.value_s, r.name)):
        if resident.size_bytes <= spare:
            going.remove(resident)
            spare -= resident.size_bytes
    return [resident.name for resident in going]


def least_recent(residents: Sequence[Resident], needed_bytes: float) -> list[str]:
    """LRU: what was not used for longest first."""
    ordered = sorted(residents, key=lambda r: (r.used_s, r.name))
    return [resident.name for resident in enough(ordered, needed_bytes)]


def enough(ordered: Sequence[Resident], needed_bytes: float) -> list[Resident]:
    """The first of them that free so many bytes together."""
    going: list[Resident] = []
    freed = 0.0
    for resident in ordered:
        if freed >= needed_bytes:
            break
        going.append(resident)
        freed += resident.size_bytes
    return going
