"""What is brought near in a slot of the day because the slot before taught it, and what came of it.

A play is one model brought to one node, one tier nearer. It counts once its bytes have moved: with what they cost, and
with what the first request saved that found the model there. Pure: no clock, no I/O; simulator and cache manager tell
it what they see.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean

from darkroom.policy.prefetch import Arms, BanditConfig, HourBandit
from darkroom.policy.worth import Tier


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """A model that could be brought nearer now."""

    name: str
    tier: Tier
    """Where to."""
    node_ids: Sequence[str]
    """Who could bring it, the best first."""
    saved_s: float
    """What the first request for it would save."""
    moved_s: float
    """How long its bytes would keep a link busy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Play:
    """An offer that was taken."""

    name: str
    tier: Tier
    node_id: str
    saved_s: float
    moved_s: float
    since_s: float
    reason: str
    arrived_s: float | None = None
    """When it was first seen where it was to come; None before, and for what requests may have brought there."""
    is_used: bool = False
    """Whether a request found it there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """All that whoever goes on with the habits has to know."""

    slot_number: int | None = None
    """Of the slot that runs, counted from time 0; None before the first."""
    plays: Sequence[Play] = ()
    """Of that slot."""
    arms: Arms = field(default_factory=dict)


class Habits:
    """The plays of the slot that runs, and what those before them taught."""

    def __init__(self, config: BanditConfig, memory: Memory | None = None) -> None:
        """`memory`: another's."""
        known = memory or Memory()
        self._config, self._bandit, self._slot_number = config, HourBandit(config, known.arms), known.slot_number
        self._plays: dict[str, Play] = {play.name: play for play in known.plays}

    @property
    def plays(self) -> tuple[Play, ...]:
        """Of the slot that runs, the most hopeful first."""
        return tuple(self._plays.values())

    def memory(self, most_arms: int) -> Memory:
        """For whoever goes on, with the arms played last."""
        return Memory(slot_number=self._slot_number, plays=self.plays, arms=self._bandit.arms(most_arms))

    def due_at_s(self) -> float:
        """When `next_slot` is due; -inf if it never was called."""
        return -math.inf if self._slot_number is None else (self._slot_number + 1) * self._config.slot_s

    def arrived(self, name: str, now_s: float) -> None:
        """The bytes of a play came to where it brings them."""
        self._plays[name] = replace(self._plays[name], arrived_s=now_s)

    def used(self, name: str, node_id: str) -> None:
        """A request found a model near at a node."""
        play = self._plays.get(name)
        if play and play.node_id == node_id and play.arrived_s is not None:
            self._plays[name] = replace(play, is_used=True)

    def next_slot(self, offers: Iterable[Offer], now_s: float) -> tuple[Play, ...]:
        """Learns from the slot that is over, and says what the one of `now_s` begins with: one play a node at most.

        Nothing, after a slot that nobody watched: its plays were not seen to their end, and this may be half over.
        """
        number = int(now_s / self._config.slot_s)
        is_watched = self._slot_number == number - 1
        if is_watched:
            self._settle(number - 1)
        self._slot_number, self._plays = number, {}
        if is_watched:
            self._begin({offer.name: offer for offer in offers}, now_s)
        return self.plays

    def _begin(self, offers: Mapping[str, Offer], now_s: float) -> None:
        slot, taken = self._bandit.slot(now_s), set[str]()
        for name in self._bandit.choose({offer.name: offer.saved_s for offer in offers.values()}, slot):
            node_id = next((node_id for node_id in offers[name].node_ids if node_id not in taken), None)
            if node_id is not None:
                taken.add(node_id)
                self._plays[name] = self._play(offers[name], node_id, slot, now_s)

    def _settle(self, slot_number: int) -> None:
        for play in self._plays.values():
            if play.arrived_s is not None:
                saved_s = play.saved_s if play.is_used else 0.0
                self._bandit.reward(play.name, slot_number % self._config.slot_count, saved_s, play.moved_s)

    def _play(self, offer: Offer, node_id: str, slot: int, now_s: float) -> Play:
        rewards = self._bandit.rewards(offer.name, slot)
        known = f"{fmean(rewards):+.2f} s a play of {len(rewards)}" if rewards else "never tried"
        return Play(
            name=offer.name,
            tier=offer.tier,
            node_id=node_id,
            saved_s=offer.saved_s,
            moved_s=offer.moved_s,
            since_s=now_s,
            reason=f"by the hour: {known} in slot {slot}",
        )
