"""Makes the cache manager's plan from what is: replicas, popularity, what operators want, and the plan before.

The rule against going to and fro: a move must gain half more than it costs to be begun, once begun it only must not
lose, and whatever a plan has brought to a replica it does not bring there again for a while. Pure: no clock, no I/O.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from darkroom.policy.cacheplan import NO_PLAN, CachePlan, Order, Outlook, Pinned, Release, StageOutlook
from darkroom.policy.plan import Node, PlanConfig, is_still_worth, plan_moves
from darkroom.policy.popularity import Band
from darkroom.policy.worth import Tier, Worth

MAIN_STAGE = "denoiser"
"""The stage that every request for a model goes through: its rates say how popular models are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheReplica:
    """A stage replica, as the plan sees it."""

    replica_id: str
    stage: str
    is_idle: bool
    rooms: tuple[float, float, float]
    """Bytes of device, host and disk; infinite where nothing bounds them, 0 where nothing is to be brought."""
    held: tuple[Mapping[str, float], Mapping[str, float], Mapping[str, float]]
    """What each of them holds: bytes by model."""
    evicts: bool = True
    """Whether models leave its device to make room."""
    is_one_memory: bool = False
    """Whether device and host are one: what it holds on disk counts as held by its host then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What an operator asked for, once."""

    model_id: str
    until_s: float
    is_drop: bool = False
    tier: Tier = Tier.DEVICE
    """Where to bring it. Nothing to a drop, which is of device and host."""
    stage: str | None = None
    """None means every stage."""
    replica_id: str | None = None
    """None means as few replicas as it takes to have `copies`; to a drop: all."""
    copies: int = 1

    def is_for(self, replica: CacheReplica) -> bool:
        """Whether a replica may be meant."""
        return self.stage in {None, replica.stage} and self.replica_id in {None, replica.replica_id}


@dataclass(frozen=True, slots=True, kw_only=True)
class Pin:
    """What an operator wants kept on devices until further notice."""

    model_id: str
    copies: int | None = 1
    """Replicas of each stage that keep it; None means all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """Numbers of the plan."""

    moves: PlanConfig = field(default_factory=PlanConfig)
    order_s: float = 120.0
    """How long an order stands, and how long after it began nothing brings the same model to the same replica."""
    release_s: float = 600.0
    """How long after an operator's drop only requests bring the model back."""
    repeat_s: float = 20.0
    """How often a plan that does not change is published all the same: who follows it takes it for a minute."""
    most_models: int = 500
    """Models, the most popular, that are moved and whose rates are told: a plan is one key, read by everybody."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """All that a plan is made from."""

    replicas: Sequence[CacheReplica]
    """By id."""
    sizes: Mapping[str, Mapping[str, float]]
    """By stage and model: bytes of the stage's part. What is not in it does not exist."""
    worths: Mapping[str, Worth]
    """By stage."""
    pins: Sequence[Pin] = ()
    wishes: Sequence[Wish] = ()
    before: CachePlan = NO_PLAN

    def at(self, stage: str) -> list[CacheReplica]:
        """The stage's replicas."""
        return [replica for replica in self.replicas if replica.stage == stage]

    def nodes(self, stage: str, plan: CachePlan) -> list[Node]:
        """They as nodes, with what a plan brings to them counted in."""
        return [
            node_of(replica, self.sizes[stage], orders=plan.orders, releases=plan.releases, pinned=plan.pinned)
            for replica in self.at(stage)
        ]


def make_plan(situation: Situation, now_s: float, config: Planned) -> CachePlan:
    """The plan, of no term and version yet. Equal situations give equal plans."""
    drawing = _Drawing(situation, now_s, config)
    drawing.carry_over()
    for wish in situation.wishes:
        drawing.grant(wish)
    for pin in situation.pins:
        drawing.pin(pin)
    for stage in sorted(situation.sizes):
        drawing.move(stage)
    drawing.complete()
    return CachePlan(
        orders=tuple(sorted(drawing.orders.values(), key=lambda o: (o.replica_id, o.model_id))),
        releases=tuple(sorted(drawing.releases.values(), key=lambda r: (r.replica_id, r.model_id))),
        pinned=tuple(sorted(drawing.pinned, key=lambda p: (p.replica_id, p.model_id))),
        outlooks=tuple(outlooks(situation, now_s, config.most_models)),
    )


class _Drawing:
    """A plan in the making: one order and one release at most for each model and replica."""

    def __init__(self, situation: Situation, now_s: float, config: Planned) -> None:
        self._situation, self._now_s, self._config = situation, now_s, config
        self._by_id = {replica.replica_id: replica for replica in situation.replicas}
        self.orders: dict[tuple[str, str], Order] = {}
        self.releases: dict[tuple[str, str], Release] = {}
        self.pinned: set[Pinned] = set()
        self._as_is = {stage: [self._node(replica) for replica in situation.at(stage)] for stage in situation.sizes}

    def carry_over(self) -> None:
        """Keeps what was planned before and has not lapsed, as far as its replica and model still exist."""
        for release in self._situation.before.releases:
            if self._stands(release):
                self.releases[release.replica_id, release.model_id] = release
        for order in self._situation.before.orders:
            if not self._stands(order):
                continue
            replica = self._by_id[order.replica_id]
            is_done = order.is_done or order.model_id in replica.held[order.tier]
            if is_done or order.is_wished or self._is_still_worth(order, replica):
                self.orders[order.replica_id, order.model_id] = replace(order, is_done=is_done)

    def grant(self, wish: Wish) -> None:
        """Makes orders or releases of a wish."""
        for replica in self._meant(wish):
            key = (replica.replica_id, wish.model_id)
            if wish.is_drop:
                self.orders.pop(key, None)
                until_s = self._now_s + self._config.release_s
                self.releases[key] = Release(replica_id=key[0], model_id=key[1], until_s=until_s)
            elif wish.model_id not in replica.held[wish.tier]:
                self.releases.pop(key, None)
                self._order(replica, wish.model_id, wish.tier, "an operator wants it", is_wished=True)

    def pin(self, pin: Pin) -> None:
        """Chooses who keeps a model, those that do first, and orders it where it is missing."""
        for stage, sizes in self._situation.sizes.items():
            if pin.model_id not in sizes:
                continue
            for replica in self._likeliest(stage, pin.model_id, Tier.DEVICE)[: pin.copies]:
                self.pinned.add(Pinned(replica_id=replica.replica_id, model_id=pin.model_id))
                self.releases.pop((replica.replica_id, pin.model_id), None)
                standing = self.orders.get((replica.replica_id, pin.model_id))
                if pin.model_id not in replica.held[Tier.DEVICE] and (standing is None or not standing.is_wished):
                    self._order(replica, pin.model_id, Tier.DEVICE, "pinned", is_wished=True)

    def move(self, stage: str) -> None:
        """Orders what is worth bringing nearer although nobody asked for it there."""
        sizes, worth = self._situation.sizes[stage], self._situation.worths.get(stage)
        if worth is None:
            return
        rates = worth.popularity.rates(self._now_s)
        asked = sorted(rates.keys() & sizes.keys(), key=lambda name: (-rates[name], name))
        movable = {name: sizes[name] for name in asked[: self._config.most_models]}
        for move in plan_moves(self._nodes(stage), movable, worth, self._now_s, self._config.moves):
            self._order(self._by_id[move.node_id], move.name, move.tier, move.reason)

    def complete(self) -> None:
        """Whole pipelines are the unit: what is ordered to a device and is on none of another stage goes there too."""
        for model_id in sorted({o.model_id for o in self.orders.values() if o.tier is Tier.DEVICE and not o.is_done}):
            for stage, sizes in self._situation.sizes.items():
                replicas = self._situation.at(stage)
                if model_id not in sizes or any(self._has(r, model_id) for r in replicas):
                    continue
                free = [
                    r for r in replicas if _room(r) >= sizes[model_id] and (r.replica_id, model_id) not in self.releases
                ]
                if free:
                    best = min(free, key=lambda r: (not r.is_idle, -_room(r), r.replica_id))
                    self._order(best, model_id, Tier.DEVICE, "completes the pipeline")

    def _order(self, replica: CacheReplica, model_id: str, tier: Tier, reason: str, *, is_wished: bool = False) -> None:
        self.orders[replica.replica_id, model_id] = Order(
            replica_id=replica.replica_id,
            model_id=model_id,
            tier=tier,
            until_s=self._now_s + self._config.order_s,
            reason=reason,
            is_wished=is_wished,
        )

    def _stands(self, item: Order | Release) -> bool:
        replica = self._by_id.get(item.replica_id)
        if replica is None or item.until_s <= self._now_s:
            return False
        return item.model_id in self._situation.sizes.get(replica.stage, {})

    def _is_still_worth(self, order: Order, replica: CacheReplica) -> bool:
        worth = self._situation.worths.get(replica.stage)
        return worth is not None and is_still_worth(
            self._node(replica),
            order.model_id,
            order.tier,
            nodes=self._as_is[replica.stage],
            size_bytes=self._situation.sizes[replica.stage][order.model_id],
            worth=worth,
            now_s=self._now_s,
        )

    def _meant(self, wish: Wish) -> list[CacheReplica]:
        """The replicas that a wish is for: of each stage, those that have least to do for it."""
        found: list[CacheReplica] = []
        for stage, sizes in self._situation.sizes.items():
            if wish.model_id in sizes:
                meant = [r for r in self._likeliest(stage, wish.model_id, wish.tier) if wish.is_for(r)]
                found += meant if wish.is_drop else meant[: wish.copies]
        return found

    def _likeliest(self, stage: str, model_id: str, tier: Tier) -> list[CacheReplica]:
        """A stage's replicas, those that keep a model already first, then those that have most room."""

        def effort(replica: CacheReplica) -> tuple[bool, bool, bool, float, str]:
            was_pinned = model_id in self._situation.before.pinned_at(replica.replica_id)
            is_coming = (replica.replica_id, model_id) in self.orders
            return (
                not was_pinned,
                model_id not in replica.held[tier],
                not is_coming,
                -_room(replica),
                replica.replica_id,
            )

        return sorted(self._situation.at(stage), key=effort)

    def _nodes(self, stage: str) -> list[Node]:
        return [self._node(replica, is_planning=True) for replica in self._situation.at(stage)]

    def _node(self, replica: CacheReplica, *, is_planning: bool = False) -> Node:
        """With what is on its way counted in, while planning: or two plans would bring one model to two replicas."""
        return node_of(
            replica,
            self._situation.sizes[replica.stage],
            orders=self.orders.values(),
            releases=self.releases.values(),
            pinned=self.pinned,
            is_planning=is_planning,
        )

    def _has(self, replica: CacheReplica, model_id: str) -> bool:
        return model_id in replica.held[Tier.DEVICE] or (replica.replica_id, model_id) in self.orders


def node_of(
    replica: CacheReplica,
    sizes: Mapping[str, float],
    *,
    orders: Iterable[Order],
    releases: Iterable[Release],
    pinned: Iterable[Pinned],
    is_planning: bool = True,
) -> Node:
    """A replica as a node. `is_planning` counts in what is on its way there."""
    own = [order for order in orders if order.replica_id == replica.replica_id]
    coming = [order for order in own if is_planning and not order.is_done]
    held = list(replica.held)
    for order in coming:
        held[order.tier] = {**held[order.tier], order.model_id: sizes[order.model_id]}
    kept = {pin.model_id for pin in pinned if pin.replica_id == replica.replica_id}
    released = {release.model_id for release in releases if release.replica_id == replica.replica_id}
    return Node(
        node_id=replica.replica_id,
        is_idle=replica.is_idle,
        is_loading=bool(coming),
        rooms=replica.rooms,
        held=tuple(held),
        busy_names=frozenset(kept if replica.evicts else (*kept, *held[Tier.DEVICE])),
        barred_names=frozenset(released | {order.model_id for order in own}),
    )


def outlooks(situation: Situation, now_s: float, most: int) -> Iterable[Outlook]:
    """What is expected of the models asked for, the most popular first."""
    main = situation.worths.get(MAIN_STAGE)
    rates = main.popularity.rates(now_s) if main else {}
    bands = main.popularity.bands(now_s) if main else {}
    known = {model_id for sizes in situation.sizes.values() for model_id in sizes}
    for model_id in sorted(rates.keys() & known, key=lambda name: (-rates[name], name))[:most]:
        stages = {
            stage: _stage_outlook(situation, stage, model_id, now_s)
            for stage, sizes in sorted(situation.sizes.items())
            if model_id in sizes and stage in situation.worths
        }
        yield Outlook(model_id=model_id, band=bands.get(model_id, Band.COLD), stages=stages)


def _stage_outlook(situation: Situation, stage: str, model_id: str, now_s: float) -> StageOutlook:
    worth = situation.worths[stage]
    return StageOutlook(rate=_rounded(worth.popularity.rate(model_id, now_s)), run_s=_rounded(worth.run_s(model_id)))


def _rounded(value: float) -> float:
    """To two digits: rates fade all the time, and a plan is only published when it says something new."""
    return float(f"{value:.2g}")


def _room(replica: CacheReplica) -> float:
    """Bytes that its device has left."""
    return replica.rooms[Tier.DEVICE] - sum(replica.held[Tier.DEVICE].values())
