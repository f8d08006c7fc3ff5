"""Which models to bring near at an hour of the day, learned from what it brought before. Pure: no clock, no I/O.

SoCC'25 prefetches warm models by a multi-armed bandit over time; arms, reward and decay are not published. Here an
arm is a model at a slot of the day, its reward the seconds that requests saved less a price for the bytes moved, and
the choice is UCB1 over the last plays of each arm (Auer et al. 2002; sliding window: Garivier & Moulines 2011, arXiv
0805.3415).
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Arms = Mapping[tuple[str, int], Sequence[float]]
"""Rewards of the last plays, by model and slot of the day; the arm that was played last comes last."""


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
    exploration_share: float | None = None
    """The same as a share of what a play may save, in its place: where models take from a tenth of a second to minutes
    to load, one number of seconds plays the small for ever and the large once. At no more than `price`, a window of
    plays in vain ends them."""
    price: float = 0.1
    """What moving costs others, as a share of the time that it takes."""
    most_plays: int = 8
    """Of one slot."""


class HourBandit:
    """Arms: models by slot of the day."""

    def __init__(self, config: BanditConfig, arms: Arms | None = None) -> None:
        """`arms`: what another has learned."""
        self.config = config
        self._rewards = {arm: deque(rewards, maxlen=config.window) for arm, rewards in (arms or {}).items()}

    def slot(self, now_s: float) -> int:
        """The slot of the day."""
        return int(now_s / self.config.slot_s) % self.config.slot_count

    def choose(self, stakes: Mapping[str, float], slot: int) -> list[str]:
        """The models worth bringing near in the slot, the best first; one never tried there comes first.

        `stakes`: seconds that a play of each may save.
        """
        plays = sum(len(rewards) for (_, other), rewards in self._rewards.items() if other == slot)
        bounds = {name: self._bound(name, slot, plays, stake_s) for name, stake_s in stakes.items()}
        hopeful = [name for name, bound in bounds.items() if bound > 0]
        return sorted(hopeful, key=lambda name: (-bounds[name], name))[: self.config.most_plays]

    def reward(self, name: str, slot: int, saved_s: float, moved_s: float) -> None:
        """Notes what a play of the slot saved requests, and how long its bytes kept a link busy."""
        rewards = self._rewards.pop((name, slot), None) or deque(maxlen=self.config.window)
        rewards.append(saved_s - self.config.price * moved_s)
        self._rewards[name, slot] = rewards

    def rewards(self, name: str, slot: int) -> tuple[float, ...]:
        """Of the last plays of an arm."""
        return tuple(self._rewards.get((name, slot), ()))

    def arms(self, most: int) -> Arms:
        """What was learned, of the arms played last."""
        return {arm: tuple(rewards) for arm, rewards in list(self._rewards.items())[-most:]}

    def _bound(self, name: str, slot: int, plays: int, stake_s: float) -> float:
        rewards = self._rewards.get((name, slot))
        if not rewards:
            return math.inf
        share = self.config.exploration_share
        exploration_s = self.config.exploration_s if share is None else share * stake_s
        return sum(rewards) / len(rewards) + exploration_s * math.sqrt(math.log(plays + 1) / len(rewards))
