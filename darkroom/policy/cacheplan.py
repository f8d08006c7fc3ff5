"""What the cache manager asks of the stage replicas, as values. Pure: no clock, no I/O.

Times are seconds of the common clock, so that a plan outlives the leader that made it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from darkroom.policy.popularity import Band
from darkroom.policy.worth import Tier, WorthConfig, missed_share


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """A model that a replica is to bring to a tier. Carried out once: what leaves later is not brought again by it."""

    replica_id: str
    model_id: str
    tier: Tier
    until_s: float
    """When it lapses. It is kept until then even if it is done, which is how a copy that was pushed out gets a rest."""
    reason: str
    is_wished: bool = False
    """Whether an operator asked for it, so that it stands whatever it is worth."""
    is_done: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """A model that a replica is to drop unless requests use it. Until it lapses only requests bring it back."""

    replica_id: str
    model_id: str
    until_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Pinned:
    """A model that must not leave a replica's device."""

    replica_id: str
    model_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StageOutlook:
    """What is expected of a model at one stage."""

    rate: float
    """Requests per second, from all routers."""
    run_s: float
    """How long each keeps a device busy."""
    copies: int
    """Replicas that have it on their device."""
    load_s: float
    """What bringing a lost copy back to a device takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """What is expected of a model."""

    model_id: str
    band: Band
    stages: Mapping[str, StageOutlook]


@dataclass(frozen=True, slots=True, kw_only=True)
class CachePlan:
    """Who holds what, as far as it is not for requests to decide."""

    term: int = 0
    """Of the leader that made it: consumers pass over plans of a lower term than they have seen."""
    version: int = 0
    """Counts up with each change, across terms."""
    orders: tuple[Order, ...] = ()
    releases: tuple[Release, ...] = ()
    pinned: tuple[Pinned, ...] = ()
    outlooks: tuple[Outlook, ...] = ()
    """Of the models asked for most, the most popular first."""

    def orders_of(self, replica_id: str) -> tuple[Order, ...]:
        """What one replica is to bring."""
        return tuple(order for order in self.orders if order.replica_id == replica_id)

    def releases_of(self, replica_id: str) -> tuple[Release, ...]:
        """What one replica is to drop."""
        return tuple(release for release in self.releases if release.replica_id == replica_id)

    def pinned_at(self, replica_id: str) -> frozenset[str]:
        """What one replica must keep."""
        return frozenset(pin.model_id for pin in self.pinned if pin.replica_id == replica_id)


NO_PLAN = CachePlan()


@dataclass(frozen=True, slots=True)
class PlannedWorth:
    """What a replica's copies are worth by a plan: for whoever chooses what leaves a tier."""

    plan: CachePlan
    stage: str
    config: WorthConfig = field(default_factory=WorthConfig)

    def seconds_lost(self, model_id: str, tier: Tier = Tier.DEVICE) -> float:
        """Seconds that requests are expected to lose without this copy; 0 for a model that nobody asks for."""
        for outlook in self.plan.outlooks:
            if outlook.model_id == model_id and (seen := outlook.stages.get(self.stage)):
                rate, others = self.config.burst * seen.rate, max(seen.copies - 1, 0)
                return missed_share(rate, seen.run_s, others, self.config.horizons_s[tier]) * seen.load_s
        return 0.0
