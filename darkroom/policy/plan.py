"""Which models should move to which nodes although nobody has asked for them there. Pure: no clock, no I/O.

Greedy by worth: the model that would gain most from one more copy goes where it pushes out least. A move must gain more
than it costs by a margin, or two models would push each other out for ever.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from darkroom.policy.worth import Tier, Worth


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A node, as the plan sees it."""

    node_id: str
    is_idle: bool
    """Whether its device has nothing to do."""
    is_loading: bool
    """Whether something moves there already."""
    rooms: tuple[float, float, float]
    """Bytes that device, host and disk hold."""
    held: tuple[Mapping[str, float], ...]
    """What each of them holds, by name, in bytes."""
    busy_names: frozenset[str] = frozenset()
    """What requests use now, which cannot be pushed out."""

    def tier_of(self, name: str) -> Tier:
        """The nearest that holds a model."""
        return next((tier for tier in (Tier.DEVICE, Tier.HOST, Tier.DISK) if name in self.held[tier]), Tier.REMOTE)

    def may_take(self, name: str, tier: Tier) -> bool:
        """Whether a model could move to a tier now, from the next one."""
        if self.is_loading or self.tier_of(name) != tier + 1:
            return False
        return self.is_idle or tier is not Tier.DEVICE

    def others(self, name: str, tier: Tier) -> list[Tier]:
        """Which other tiers hold a model."""
        return [other for other in (Tier.DEVICE, Tier.HOST, Tier.DISK) if other != tier and name in self.held[other]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """One model to bring to one tier of one node."""

    node_id: str
    name: str
    tier: Tier
    gain_s: float
    """Seconds that requests are expected to save by it."""
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanConfig:
    """When a move is worth making."""

    margin: float = 1.5
    """How many times what is pushed out a newcomer must be worth: less, and models push each other to and fro."""
    least_gains_s: tuple[float, float, float] = (0.05, 0.05, 4.0)
    """Gain below which nothing moves to device, host or disk: what moves there, others cannot."""
    most_moves: int = 8
    """Of one plan, per tier."""


@dataclass(slots=True)
class Plan:
    """Moves, the most worthwhile first of each tier."""

    moves: list[Move] = field(default_factory=list)


def copies(nodes: Sequence[Node], tier: Tier) -> dict[str, int]:
    """How many nodes hold each model on the tier."""
    counts: dict[str, int] = {}
    for node in nodes:
        for name in node.held[tier]:
            counts[name] = counts.get(name, 0) + 1
    return counts


def plan_moves(
    nodes: Sequence[Node], sizes: Mapping[str, float], worth: Worth, now_s: float, config: PlanConfig
) -> list[Move]:
    """At most one move per node. `sizes`: of all models that may move, in bytes."""
    taken: set[str] = set()
    moves: list[Move] = []
    for tier in (Tier.DEVICE, Tier.HOST, Tier.DISK):
        counts = copies(nodes, tier)
        missed = {name: worth.missed_share(name, tier, counts.get(name, 0), now_s) for name in sizes}
        ranked = sorted(sizes, key=lambda name: (-missed[name] * sizes[name], name))
        for name in ranked[: config.most_moves]:
            candidates = [
                move
                for node in nodes
                if node.node_id not in taken and node.may_take(name, tier)
                for move in [_move(node, name, sizes[name], tier, missed[name], counts, worth, now_s, config)]
                if move
            ]
            if candidates:
                best = max(candidates, key=lambda move: (move.gain_s, move.node_id))
                taken.add(best.node_id)
                moves.append(best)
    return moves


def _move(
    node: Node,
    name: str,
    size_bytes: float,
    tier: Tier,
    missed: float,
    counts: Mapping[str, int],
    worth: Worth,
    now_s: float,
    config: PlanConfig,
) -> Move | None:
    """The move, if it gains enough on this node."""
    lost_s = _displaced_s(node, size_bytes, tier, counts, worth, now_s)
    saved_s = size_bytes * missed * worth.times.saved_s(node.tier_of(name), tier)
    if lost_s is None or saved_s <= config.margin * lost_s + config.least_gains_s[tier]:
        return None
    reason = f"saves {saved_s:.2f} s, pushes out {lost_s:.2f} s, {counts.get(name, 0)} copies so far"
    return Move(node_id=node.node_id, name=name, tier=tier, gain_s=saved_s - lost_s, reason=reason)


def _displaced_s(
    node: Node, size_bytes: float, tier: Tier, counts: Mapping[str, int], worth: Worth, now_s: float
) -> float | None:
    """What the least valuable models that must go are worth; None if what is in use leaves no room."""
    held = node.held[tier]
    needed = sum(held.values()) + size_bytes - node.rooms[tier]
    if needed <= 0:
        return 0.0
    values = sorted(
        (worth.value_s(name, size, tier, node.others(name, tier), counts.get(name, 1) - 1, now_s) / size, size)
        for name, size in held.items()
        if name not in node.busy_names
    )
    lost_s = 0.0
    for value_per_byte, size in values:
        lost_s += value_per_byte * size
        needed -= size
        if needed <= 0:
            return lost_s
    return None
