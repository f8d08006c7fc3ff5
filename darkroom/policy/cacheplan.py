"""What the cache manager asks of the stage replicas, as values. Pure: no clock, no I/O.

Times are seconds of the common clock, so that a plan outlives the leader that made it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from darkroom.policy.appraisal import Asked
from darkroom.policy.popularity import Band
from darkroom.policy.worth import Tier


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
    """Counts up with each that is published, across terms: an unchanged plan is, too, so that it is known to stand."""
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

    def asked_at(self, stage: str, elsewhere: Mapping[str, tuple[int, int, int]]) -> dict[str, Asked]:
        """How often models are asked for at a stage. `elsewhere`: copies that other replicas have, by tier."""
        return {
            outlook.model_id: Asked(rate=seen.rate, run_s=seen.run_s, others=elsewhere.get(outlook.model_id, (0, 0, 0)))
            for outlook in self.outlooks
            if (seen := outlook.stages.get(stage))
        }


NO_PLAN = CachePlan()
