"""The bandit by the hour at work in the leader: what it knows is in the registry, and is read from there each time.

The rule: a play is written down before it is ordered, so that whoever leads next neither makes it twice nor forgets
what it was for.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import structlog

from darkroom.policy.cacheplan import CachePlan, Order
from darkroom.policy.habits import Habits, Memory, Play
from darkroom.policy.hourly import offers, orders, watch
from darkroom.policy.planning import Planned, Situation
from darkroom.policy.prefetch import BanditConfig
from darkroom.policy.worth import Tier
from darkroom.registry import keys
from darkroom.registry.election import Fenced
from darkroom.registry.json_fields import finite, finite_or_none, items, text, whole, yes

_log = structlog.get_logger()
_MOST_ARMS = 1000
"""Of each stage: the registry's values are small."""


class Hours:
    """What the hour of the day adds to the plan."""

    def __init__(self, bandit: BanditConfig, planned: Planned, asked_s: Callable[[str, str], float | None]) -> None:
        """`asked_s`: when a stage last ran a model, as far as reports say."""
        self._bandit, self._planned, self._asked_s = bandit, planned, asked_s

    async def add_to(self, plan: CachePlan, situation: Situation, leading: Fenced, now_s: float) -> CachePlan:
        """The plan, with what the slot of `now_s` begins with if it is new. Raises RegistryUnavailable or Deposed."""
        kept = (await leading.read(keys.HABITS)).get(keys.HABITS, b"")
        memories = self._parsed(kept)
        habits = {stage: Habits(self._bandit, memories.get(stage)) for stage in situation.sizes}
        new = [order for stage, each in habits.items() for order in self._orders(stage, each, plan, situation, now_s)]
        known = habits_json(self._bandit, {stage: each.memory(_MOST_ARMS) for stage, each in habits.items()})
        if known != kept:
            await leading.put(keys.HABITS, known)
        return replace(plan, orders=tuple(sorted((*plan.orders, *new), key=lambda o: (o.replica_id, o.model_id))))

    def _orders(self, stage: str, habits: Habits, plan: CachePlan, situation: Situation, now_s: float) -> list[Order]:
        watch(habits, situation.at(stage), lambda name: self._asked_s(stage, name), now_s)
        if now_s < habits.due_at_s():
            return []
        _tell(stage, habits.plays)
        found = offers(situation, stage, plan, now_s, self._planned.moves)
        return orders(habits.next_slot(found, now_s), now_s, self._planned.order_s)

    def _parsed(self, value: bytes) -> Mapping[str, Memory]:
        try:
            return parse_habits(self._bandit, value) if value else {}
        except ValueError as error:
            _log.warning("habits_passed_over", problem=str(error)[:200])
            return {}


def _tell(stage: str, plays: Iterable[Play]) -> None:
    """Logs what the plays of a slot came to."""
    moved = [play for play in plays if play.arrived_s is not None]
    if moved:
        used = [play for play in moved if play.is_used]
        _log.info(
            "hour_is_over",
            stage=stage,
            moved_count=len(moved),
            used_count=len(used),
            moved_s=round(sum(play.moved_s for play in moved), 3),
            saved_s=round(sum(play.saved_s for play in used), 3),
        )


def habits_json(config: BanditConfig, memories: Mapping[str, Memory]) -> bytes:
    """All that `parse_habits` needs, by stage. What it has read it gives again, byte for byte."""
    return json.dumps(
        {
            "slot_s": config.slot_s,
            "slot_count": config.slot_count,
            "stages": {
                stage: {
                    "slot_number": memory.slot_number,
                    "plays": [_play_fields(play) for play in memory.plays],
                    "arms": [[*arm, *(round(reward, 6) for reward in rewards)] for arm, rewards in memory.arms.items()],
                }
                for stage, memory in sorted(memories.items())
            },
        },
        separators=(",", ":"),
    ).encode()


def parse_habits(config: BanditConfig, value: bytes) -> dict[str, Memory]:
    """By stage; nothing of slots that are not this bandit's. Raises ValueError for what was never kept."""
    try:
        fields = json.loads(value)
        if (finite(fields["slot_s"]), whole(fields["slot_count"])) != (config.slot_s, config.slot_count):
            return {}
        return {text(stage): _memory(memory, config) for stage, memory in fields["stages"].items()}
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise ValueError(f"not what was learned by the hour: {error!r}") from error


def _play_fields(play: Play) -> dict[str, Any]:
    return {
        "name": play.name,
        "tier": play.tier.name.lower(),
        "node_id": play.node_id,
        "saved_s": round(play.saved_s, 6),
        "moved_s": round(play.moved_s, 6),
        "since_s": play.since_s,
        "reason": play.reason,
        "arrived_s": play.arrived_s,
        "is_used": play.is_used,
    }


def _play(fields: Any) -> Play:
    return Play(
        name=text(fields["name"]),
        tier=Tier[text(fields["tier"]).upper()],
        node_id=text(fields["node_id"]),
        saved_s=finite(fields["saved_s"]),
        moved_s=finite(fields["moved_s"]),
        since_s=finite(fields["since_s"]),
        reason=text(fields["reason"]),
        arrived_s=finite_or_none(fields["arrived_s"]),
        is_used=yes(fields["is_used"]),
    )


def _memory(fields: Any, config: BanditConfig) -> Memory:
    number = fields["slot_number"]
    arms = {}
    for name, slot, *rewards in items(fields["arms"]):
        if whole(slot) >= config.slot_count:
            raise ValueError(f"no slot {slot}")
        arms[text(name), slot] = tuple(finite(reward) for reward in rewards)
    return Memory(
        slot_number=None if number is None else whole(number),
        plays=tuple(_play(play) for play in items(fields["plays"])[: config.most_plays]),
        arms=arms,
    )
