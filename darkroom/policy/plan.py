"""Which models should move to which nodes although nobody has asked for them there. Pure: no clock, no I/O.

Greedy by worth: the model that would gain most from one more copy goes where it pushes out least. A move must gain more
than it costs by a margin, or two models would push each other out for ever.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

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
    """What requests use now, or operators keep there, which cannot be pushed out."""
    barred_names: frozenset[str] = frozenset()
    """What must not move there for now."""

    def tier_of(self, name: str) -> Tier:
        """The nearest that holds a model."""
        for tier in (Tier.DEVICE, Tier.HOST, Tier.DISK):  # a loop: a plan asks this more often than anything else
            if name in self.held[tier]:
                return tier
        return Tier.REMOTE

    def may_take(self, name: str, tier: Tier) -> bool:
        """Whether a model could move to a tier now, from the next one."""
        if self.is_loading or name in self.barred_names or self.tier_of(name) != tier + 1:
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
    least_gains_s: tuple[float, float, float] = (0.05, 0.05, 8.0)
    """Gain below which nothing moves to device, host or disk: what moves there, others cannot."""
    most_moves: int = 8
    """Of one plan, per tier."""


def plan_moves(
    nodes: Sequence[Node], sizes: Mapping[str, float], worth: Worth, now_s: float, config: PlanConfig
) -> list[Move]:
    """At most one move per node. `sizes`: of all models that may move, in bytes."""
    taken: set[str] = set()
    moves: list[Move] = []
    for tier in (Tier.DEVICE, Tier.HOST, Tier.DISK):
        if all(sizes.keys() <= node.held[tier].keys() for node in nodes):
            continue  # everything lies there already: to count thousands of names takes long
        round_ = _Round(tier, Counter(name for node in nodes for name in node.held[tier]), worth, now_s, config)
        for name, size_bytes in round_.ranked(sizes):
            free = [node for node in nodes if node.node_id not in taken and node.may_take(name, tier)]
            found = [move for node in free if (move := round_.move(node, name, size_bytes))]
            if found:
                best = max(found, key=lambda move: (move.gain_s, move.node_id))
                taken.add(best.node_id)
                moves.append(best)
    return moves


def nearer(
    nodes: Sequence[Node], sizes: Mapping[str, float], worth: Worth, now_s: float, config: PlanConfig
) -> Iterator[Move]:
    """Every way to bring one of `sizes` one tier nearer than it is anywhere, that gains more than it pushes out.

    However little it gains: whoever asks has a reason of their own to bring it.
    """
    config = replace(config, least_gains_s=(0.0, 0.0, 0.0))
    for tier in (Tier.DEVICE, Tier.HOST, Tier.DISK):
        round_ = _Round(tier, Counter(name for node in nodes for name in node.held[tier]), worth, now_s, config)
        for name, size_bytes in sizes.items():
            if min((node.tier_of(name) for node in nodes), default=Tier.DEVICE) > tier:
                free = [node for node in nodes if node.may_take(name, tier)]
                yield from (move for node in free if (move := round_.move(node, name, size_bytes)))


def is_still_worth(
    node: Node, name: str, tier: Tier, *, nodes: Sequence[Node], size_bytes: float, worth: Worth, now_s: float
) -> bool:
    """Whether a move that was begun gains more than it costs: the margin is for beginning."""
    counts = Counter(other for each in nodes for other in each.held[tier])
    lenient = PlanConfig(margin=1.0, least_gains_s=(0.0, 0.0, 0.0))
    return _Round(tier, counts, worth, now_s, lenient).move(node, name, size_bytes) is not None


@dataclass(frozen=True, slots=True)
class _Round:
    """The plan of one tier."""

    tier: Tier
    counts: Counter[str]
    """Nodes that hold each model on the tier."""
    worth: Worth
    now_s: float
    config: PlanConfig
    values: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    """By node: value per byte and bytes of what may leave, the least valuable first."""

    def ranked(self, sizes: Mapping[str, float]) -> list[tuple[str, float]]:
        """Names and sizes of those that may gain enough by one more copy, the most first."""
        most_s_per_byte = self.worth.times.saved_s(Tier(self.tier + 1), self.tier)
        most_s = {name: size * self._missed(name) * most_s_per_byte for name, size in sizes.items()}
        enough = [name for name, saved_s in most_s.items() if saved_s > self.config.least_gains_s[self.tier]]
        enough.sort(key=lambda name: (-most_s[name], name))
        return [(name, sizes[name]) for name in enough[: self.config.most_moves]]

    def move(self, node: Node, name: str, size_bytes: float) -> Move | None:
        """The move, if it gains enough on this node."""
        lost_s = self._displaced_s(node, size_bytes)
        saved_s = size_bytes * self._saved_s(name, node.tier_of(name))
        if lost_s is None or saved_s <= self.config.margin * lost_s + self.config.least_gains_s[self.tier]:
            return None
        reason = f"saves {saved_s:.2f} s, pushes out {lost_s:.2f} s, {self.counts[name]} copies so far"
        return Move(node_id=node.node_id, name=name, tier=self.tier, gain_s=saved_s - lost_s, reason=reason)

    def _saved_s(self, name: str, source: Tier) -> float:
        """Per byte, by one more copy."""
        return self._missed(name) * self.worth.times.saved_s(source, self.tier)

    def _missed(self, name: str) -> float:
        """Share of requests that one more copy would spare a load."""
        return self.worth.missed_share(name, self.tier, self.counts[name], self.now_s)

    def _displaced_s(self, node: Node, size_bytes: float) -> float | None:
        """What the least valuable models that must go are worth; None if what is in use leaves no room."""
        held = node.held[self.tier]
        needed = sum(held.values()) + size_bytes - node.rooms[self.tier]
        if needed <= 0:
            return 0.0
        lost_s = 0.0
        if node.node_id not in self.values:
            self.values[node.node_id] = sorted(
                (self._value_per_byte(node, name), size) for name, size in held.items() if name not in node.busy_names
            )
        for value_per_byte, size in self.values[node.node_id]:
            lost_s += value_per_byte * size
            needed -= size
            if needed <= 0:
                return lost_s
        return None

    def _value_per_byte(self, node: Node, name: str) -> float:
        missed = self.worth.missed_share(name, self.tier, self.counts[name] - 1, self.now_s)
        return missed * self.worth.times.back_s(self.tier, node.others(name, self.tier))
