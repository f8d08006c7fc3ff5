"""Habits in the cache manager's plan: what they may bring nearer, as orders, and what came of it, read off the cluster.

Plays are orders like others: on idle replicas, one at a time, and what a plan has brought rests. They push out only
what the plan itself would push out for them; from a device, where a guess would displace what serves now, nothing.
Pure: no clock, no I/O.
"""

from collections.abc import Callable, Iterable, Sequence

from darkroom.policy.cacheplan import CachePlan, Order
from darkroom.policy.habits import Habits, Offer, Play
from darkroom.policy.plan import Move, Node, PlanConfig, nearer
from darkroom.policy.planning import CacheReplica, Situation
from darkroom.policy.popularity import Band
from darkroom.policy.worth import LoadTimes, Tier

_MOST_OFFERS = 32
"""Warm models, the most popular, that are thought of: more than that are never tried to the end."""


def watch(
    habits: Habits, replicas: Iterable[CacheReplica], asked_s: Callable[[str], float | None], now_s: float
) -> None:
    """Tells the habits of a stage what became of their plays. `asked_s`: when a model was last asked for there.

    Nobody says which request found what. So a copy that came while its replica had requests, or after somebody had
    asked for the model, is taken for theirs and counts for nothing; one that was on the device after a later request is
    taken for used.
    """
    by_id = {replica.replica_id: replica for replica in replicas}
    for play in habits.plays:
        replica, last_s = by_id.get(play.node_id), asked_s(play.name)
        if replica is None:
            continue
        is_ready = play.name in replica.held[Tier.DEVICE]
        if play.arrived_s is None:
            is_there = play.name in replica.held[play.tier] and is_ready == (play.tier is Tier.DEVICE)
            if is_there and replica.is_idle and (last_s is None or last_s <= play.since_s):
                habits.arrived(play.name, now_s)
        elif is_ready and last_s is not None and last_s > play.arrived_s:
            habits.used(play.name, play.node_id)


def offers(situation: Situation, stage: str, plan: CachePlan, now_s: float, config: PlanConfig) -> list[Offer]:
    """The warm models of a stage that could be brought one tier nearer than they are anywhere.

    To the device only from a memory that is also the host's; from a memory of its own that is the plan's to judge.
    """
    worth, sizes, nodes = situation.worths[stage], situation.sizes[stage], situation.nodes(stage, plan)
    bands, rates = worth.popularity.bands(now_s), worth.popularity.rates(now_s)
    warm = sorted((name for name in sizes if bands.get(name) is Band.WARM), key=lambda name: (-rates[name], name))
    thought_of = {name: sizes[name] for name in warm[:_MOST_OFFERS]}
    by_id = {node.node_id: node for node in nodes}
    one_memory = {replica.replica_id for replica in situation.at(stage) if replica.is_one_memory}
    found: dict[str, list[Move]] = {}
    for move in nearer(nodes, thought_of, worth, now_s, config):
        node = by_id[move.node_id]
        is_free = move.node_id in one_memory and _room(node, Tier.DEVICE) >= sizes[move.name]
        if node.is_idle and (move.tier is not Tier.DEVICE or is_free):
            found.setdefault(move.name, []).append(move)
    return [_offer(moves, by_id, sizes[name], worth.times) for name, moves in sorted(found.items())]


def orders(plays: Iterable[Play], now_s: float, order_s: float) -> list[Order]:
    """What is ordered for plays."""
    return [
        Order(
            replica_id=play.node_id,
            model_id=play.name,
            tier=play.tier,
            until_s=now_s + order_s,
            reason=play.reason,
        )
        for play in plays
    ]


def _offer(moves: Sequence[Move], by_id: dict[str, Node], size_bytes: float, times: LoadTimes) -> Offer:
    """To those that have most room."""
    name, tier = moves[0].name, moves[0].tier
    saved_s = size_bytes * times.saved_s(Tier(tier + 1), tier)
    ranked = sorted(moves, key=lambda move: (-_room(by_id[move.node_id], tier), move.node_id))
    return Offer(
        name=name,
        tier=tier,
        node_ids=[move.node_id for move in ranked],
        saved_s=saved_s,
        moved_s=size_bytes * times.network_s if tier is Tier.DISK else saved_s,
    )


def _room(node: Node, tier: Tier) -> float:
    return node.rooms[tier] - sum(node.held[tier].values())
