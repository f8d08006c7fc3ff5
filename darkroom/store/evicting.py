"""What leaves this process's tiers, its node's disk among them: by worth, or by age. What is pinned never does.

Whoever opens a tier says how to ask what it holds, and gets what decides there. Requests and loads are told as they
end.
"""

import functools
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Literal

from darkroom.policy.appraisal import Appraisal, Asked
from darkroom.policy.eviction import Evict, Resident, least_recent, least_valuable
from darkroom.policy.pace import Pace
from darkroom.policy.popularity import Popularity
from darkroom.policy.worth import Tier, Worth, WorthConfig

EvictionKind = Literal["worth", "lru"]
HeldBytes = Callable[[str], float]
"""How many bytes a tier holds of what a model uses."""
_KEPT_SHARE = 0.5
"""Of a resident's bytes: a tier that has so many of its models' has it too. Weights may be half as wide there."""


class Eviction:
    """One for all tiers of a process. Its methods may be called from any thread."""

    def __init__(self, kind: EvictionKind = "worth", *, clock: Callable[[], float] = time.monotonic) -> None:
        """By worth, things that nobody has asked for go as by age."""
        self._kind, self._clock = kind, clock
        self._pace = Pace()
        self._appraisal = Appraisal(Worth(Popularity(), self._pace.times, WorthConfig()))
        self._lock = threading.Lock()
        self._held: dict[Tier, HeldBytes] = {}
        self._pinned: frozenset[str] = frozenset()

    def of(self, tier: Tier, held_bytes: HeldBytes) -> Evict:
        """What decides on a tier. `held_bytes` may be called from any thread, too."""
        self._held[tier] = held_bytes
        return functools.partial(self._choose, tier)

    def pin(self, model_ids: Collection[str]) -> None:
        """These models, and no others from now on, stay: a load that only they could make room for fails."""
        self._pinned = frozenset(model_ids)

    @property
    def pinned(self) -> frozenset[str]:
        """Those that stay."""
        return self._pinned

    def ran(self, model_ids: Collection[str], run_s: float) -> None:
        """Notes that a request that used these was run here for so long."""
        with self._lock:
            now_s = self._clock()
            for model_id in model_ids:
                self._appraisal.worth.add(model_id, now_s, run_s)

    def loaded(self, tier: Tier, size_bytes: int, seconds: float) -> None:
        """Notes how long it took to bring so many bytes to a tier from the next one."""
        with self._lock:
            self._pace.add(tier, size_bytes, seconds)
            self._appraisal.worth.times = self._pace.times

    def tell(self, asked: Mapping[str, Asked], *, fresh_s: float) -> None:
        """Takes what the whole cluster is asked for, by model id, where this replica saw less of it, for so long."""
        with self._lock:
            self._appraisal.tell(asked, self._clock() + fresh_s)

    def _choose(self, tier: Tier, residents: Sequence[Resident], needed_bytes: float) -> list[str]:
        pinned = self._pinned
        free = [resident for resident in residents if pinned.isdisjoint(resident.models)]
        if self._kind == "lru":
            return least_recent(free, needed_bytes)
        kept = [self._kept(tier, resident) for resident in free]  # before the lock: tiers have locks of their own
        with self._lock:
            now_s, value_s = self._clock(), self._appraisal.value_s
            valued = [
                replace(resident, value_s=value_s(resident, tier, others, now_s))
                for resident, others in zip(free, kept, strict=True)
            ]
        return least_valuable(valued, needed_bytes)

    def _kept(self, tier: Tier, resident: Resident) -> list[Tier]:
        """The other tiers that hold it too."""
        enough_bytes = _KEPT_SHARE * resident.size_bytes
        return [
            other
            for other, held_bytes in self._held.items()
            if other != tier and any(held_bytes(model_id) >= enough_bytes for model_id in resident.models)
        ]
