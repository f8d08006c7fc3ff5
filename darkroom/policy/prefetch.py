"""Which models to bring near at an hour of the day, learned from what it brought before. Pure: no clock, no I/O.

SoCC'25 prefetches warm models by a multi-armed bandit over time; arms, reward and decay are not published. Here an
arm is a model at a slot of the day, its reward the seconds that requests saved less a price for the bytes moved, and
the choice is UCB1 over the last plays of each arm (Auer et al. 2002; sliding window: Garivier & Moulines 2011, arXiv
0805.3415).
"""

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class BanditConfig:
    """How the bandit learns."""

    slot_s: float = 3600.0
    """Length of a slot of the day."""
    slot_count: int = 24
    window: int = 7
    """Plays of an arm that count: a week."""
    exploration_s: float = 2.0
    """Seconds that an arm played once among many might be worth more than it showed."""
    price: float = 0.1
    """What moving costs others, as a share of the time that it takes."""


class HourBandit:
    """Arms: models by slot of the day."""

    def __init__(self, config: BanditConfig) -> None:
        self.config = config
        self._rewards: dict[tuple[str, int], deque[float]] = {}

    def slot(self, now_s: float) -> int:
        """The slot of the day."""
        return int(now_s / self.config.slot_s) % self.config.slot_count

    def choose(self, names: Iterable[str], slot: int, count: int) -> list[str]:
        """At most `count` models worth bringing near in the slot, the best first; one never tried there comes first."""
        plays = sum(len(rewards) for (_, other), rewards in self._rewards.items() if other == slot)
        bounds = {name: self._bound(name, slot, plays) for name in names}
        hopeful = [name for name, bound in bounds.items() if bound > 0]
        return sorted(hopeful, key=lambda name: (-bounds[name], name))[:count]

    def reward(self, name: str, slot: int, saved_s: float, moved_s: float) -> None:
        """Notes what a play of the slot saved requests, and how long its bytes kept a link busy."""
        rewards = self._rewards.setdefault((name, slot), deque(maxlen=self.config.window))
        rewards.append(saved_s - self.config.price * moved_s)

    def _bound(self, name: str, slot: int, plays: int) -> float:
        rewards = self._rewards.get((name, slot))
        if not rewards:
            return math.inf
        return sum(rewards) / len(rewards) + self.config.exploration_s * math.sqrt(math.log(plays + 1) / len(rewards))
