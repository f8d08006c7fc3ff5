"""A small cluster as its services run it: the router's own forecasts, evictions by what each replica saw itself.

What the simulator is calibrated with. No plans: they would only hide where the two differ.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from darkroom.policy.appraisal import Appraisal
from darkroom.policy.eviction import Evict, Resident, least_recent, least_valuable
from darkroom.policy.forecast import Expected, Forecast
from darkroom.policy.placement import choose_replica
from darkroom.policy.popularity import Popularity
from darkroom.policy.worth import Tier, Worth, WorthConfig
from simulator.cluster import Cluster
from simulator.costs import Loader, Work
from simulator.worker import DEVICE, DISK, Job, Worker
from simulator.workload import Request

_STAGE = "denoiser"
_HELD = (Tier.DEVICE, Tier.HOST, Tier.DISK)


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveConfig:
    """What was measured of the cluster, and what it was told."""

    loader: Loader
    work: Work
    max_images: int = 32
    eviction: Literal["worth", "lru"] = "worth"
    model_bytes: int = 0
    """Of a model's files: what a router guesses a load by that it has not seen."""
    model_names: tuple[str, ...] = ()
    """All models of the store, which lie on every node's disk from the start."""


class Live:
    """The services' policies as they are wired there."""

    def __init__(self, config: LiveConfig) -> None:
        self.loader, self.work, self.max_images = config.loader, config.work, config.max_images
        self._config, self._forecast = config, Forecast()
        self._running: Counter[int] = Counter()
        self._alone: dict[int, bool] = {}
        """By request: whether the model was held, of those that had their replica to themselves."""
        self._appraisals: dict[int, Appraisal] = {}

    def begin(self, cluster: Cluster) -> None:
        """Before the first request: every model is on disk."""
        self._cluster = cluster
        for worker in cluster.workers:
            for name in self._config.model_names:
                worker.shelves[DISK].put(name, cluster.sizes.base(name), 0.0)

    def rewritten(self, request: Request) -> Request:
        """The request itself."""
        return request

    def evict(self, tier: int, worker_id: int) -> Evict:
        """What decides on a tier of a worker."""
        appraisal = self._appraisals.setdefault(worker_id, self._appraisal())

        def by_worth(residents: Sequence[Resident], needed: float) -> list[str]:
            worker, now_s = self._cluster.workers[worker_id], self._cluster.clock.now_s
            valued = []
            for resident in residents:
                kept = [other for other in _HELD if other != tier and resident.name in worker.shelves[other]]
                used = replace(resident, models=(resident.name,))
                valued.append(replace(used, value_s=appraisal.value_s(used, Tier(tier), kept, now_s)))
            return least_valuable(valued, needed)

        return by_worth if self._config.eviction == "worth" else least_recent

    def _appraisal(self) -> Appraisal:
        return Appraisal(Worth(Popularity(), self.loader, WorthConfig()))

    def choose(self, request: Request) -> Worker:
        """As the router does, by its forecast."""
        chosen = choose_replica(
            [
                self._forecast.candidate(
                    Expected(
                        replica_id=f"{worker.worker_id:03}",
                        running_count=self._running[worker.worker_id],
                        holds_model=request.base in worker.shelves[DEVICE],
                        is_suspect=False,
                    ),
                    _STAGE,
                    request.base,
                    _amount(request),
                    self._config.model_bytes,
                )
                for worker in self._cluster.workers
            ]
        )
        assert chosen is not None
        worker = self._cluster.workers[int(chosen.replica_id)]
        if not self._running[worker.worker_id]:
            self._alone[request.number] = request.base in worker.shelves[DEVICE]
        self._running[worker.worker_id] += 1
        return worker

    def finished(self, job: Job) -> None:
        """What the router and the replica learn from an answer."""
        self._running[job.worker_id] -= 1
        now_s, request = self._cluster.clock.now_s, job.request
        held = self._alone.pop(request.number, None)
        if held is not None:
            self._forecast.add(_STAGE, request.base, _amount(request), now_s - request.arrival_s, held=held)
        self._appraisals[job.worker_id].worth.add(request.base, now_s, now_s - job.start_s)


def _amount(request: Request) -> float:
    return request.step_count * request.image_count
