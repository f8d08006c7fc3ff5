"""What a tier of a node holds, within its bound."""

from collections import Counter
from dataclasses import dataclass

from darkroom.policy.eviction import Evict, Resident

ROUNDING = 1e-9
"""Sizes that differ by less are equal."""


@dataclass(slots=True)
class Item:
    """A component on a shelf."""

    name: str
    size: float
    used_s: float
    use_count: int = 0
    """Requests and loads that need it to stay."""


class Shelf:
    """Named items whose sizes together stay within `room`.

    Invariant: an item in use is never dropped.
    """

    def __init__(self, room: float, evict: Evict, holders: Counter[str]) -> None:
        """`holders`: how many shelves of this tier hold each item, kept up to date."""
        self.room, self._evict, self._holders = room, evict, holders
        self.items: dict[str, Item] = {}
        self.taken = 0.0

    def __contains__(self, name: str) -> bool:
        return name in self.items

    def touch(self, name: str, now_s: float) -> None:
        """Notes that an item was used, if it is here."""
        item = self.items.get(name)
        if item:
            item.used_s = now_s

    def put(self, name: str, size: float, now_s: float) -> Item | None:
        """Makes room, and puts the item there. Returns it; None if too much is in use, and then nothing changes."""
        found = self.items.get(name)
        if found:
            found.used_s = now_s
            return found
        if not self.make_room(size):
            return None
        item = self.items[name] = Item(name, size, now_s)
        self._holders[name] += 1
        self.taken += size
        return item

    def make_room(self, size: float) -> bool:
        """Drops what the policy gives up until `size` fits. False, and nothing dropped, if it cannot."""
        needed = self.taken + size - self.room
        if needed <= ROUNDING:
            return True
        idle = [item for item in self.items.values() if not item.use_count]
        if sum(item.size for item in idle) < needed - ROUNDING:
            return False
        residents = [Resident(name=item.name, size_bytes=item.size, used_s=item.used_s) for item in idle]
        for name in self._evict(residents, needed):
            needed -= self.items[name].size
            self.drop(name)
            if needed <= ROUNDING:
                return True
        raise AssertionError("the policy gave up too little")

    def drop(self, name: str) -> None:
        """Takes an item away."""
        self.taken -= self.items.pop(name).size
        self._holders[name] -= 1
