"""What a node's tiers hold is worth to the models that use it. Pure: no clock, no I/O.

Whole models are asked for; tiers hold their components, which models share. A component is asked for as often as all
that use it together, so it is worth what it is worth to each, as far as they would not bring it back for one another.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from darkroom.policy.eviction import Resident
from darkroom.policy.worth import Tier, Worth


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """How often a model is asked for in the whole cluster, and who else has it."""

    rate: float
    """Requests per second."""
    run_s: float
    """How long one keeps a device busy, in seconds."""
    others: tuple[int, int, int] = (0, 0, 0)
    """Other replicas that hold it on their device, in host memory, on disk."""


class Appraisal:
    """Values of residents, from the requests that ran here, or what somebody says of the whole cluster."""

    def __init__(self, worth: Worth) -> None:
        """`worth` hears of the requests that run here. It takes this replica for the only one."""
        self.worth = worth
        self._told: Mapping[str, Asked] = {}
        self._until_s = -math.inf

    def tell(self, asked: Mapping[str, Asked], until_s: float) -> None:
        """Takes this, by model id, for what was seen here, until then; where more was seen, that counts."""
        self._told, self._until_s = dict(asked), until_s

    def value_s(self, resident: Resident, tier: Tier, kept: Collection[Tier], now_s: float) -> float:
        """Seconds that requests would lose without it on this tier, where the tiers `kept` still hold it.

        The models' misses together: a load for one spares the others theirs.
        """
        missed = 0.0
        for model_id in resident.models:
            missed += (1 - missed) * self._missed_share(model_id, tier, now_s)
        return resident.size_bytes * missed * self.worth.times.back_s(tier, kept)

    def _missed_share(self, model_id: str, tier: Tier, now_s: float) -> float:
        told = self._told.get(model_id) if now_s < self._until_s else None
        if told is None:
            return self.worth.missed_share(model_id, tier, 0, now_s)
        rate = max(told.rate, self.worth.popularity.rate(model_id, now_s))  # it is told late of requests that ran here
        return self.worth.missed_share_at(rate, told.run_s, tier, told.others[tier])
