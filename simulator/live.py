"""A cluster as its services run it: the router's own forecasts, evictions by what each replica saw itself.

What the simulator is calibrated with. No plans: they would only hide where the two differ; `served` has them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from darkroom.policy.appraisal import Appraisal
from darkroom.policy.assignments import Announced, Assignments, HeldModel, Prepared, Sent
from darkroom.policy.eviction import Evict, Resident, least_recent, least_valuable
from darkroom.policy.forecast import Wanted
from darkroom.policy.placement import choose_replica
from darkroom.policy.popularity import Popularity
from darkroom.policy.worth import Tier, Worth, WorthConfig
from simulator.cluster import Cluster
from simulator.costs import Loader, Work
from simulator.fleet import FleetConfig
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
    """Of a model's files, by which a router guesses what it has not seen: loads, and what they push out."""
    model_names: tuple[str, ...] = ()
    """All models of the store, which lie on every node's disk from the start."""


class Live:
    """The services' policies as they are wired there."""

    fleet: FleetConfig | None = None

    def __init__(self, config: LiveConfig) -> None:
        self.loader, self.work, self.max_images = config.loader, config.work, config.max_images
        self._config, self._assignments = config, Assignments()
        self._sent: dict[int, tuple[Sent, Prepared | None]] = {}
        """By request, with the load that was asked for when it came."""
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
            self.tell(appraisal, worker, residents, now_s)
            valued = []
            for resident in residents:
                kept = [other for other in _HELD if other != tier and resident.name in worker.shelves[other]]
                used = replace(resident, models=(resident.name,))
                valued.append(replace(used, value_s=appraisal.value_s(used, Tier(tier), kept, now_s)))
            return least_valuable(valued, needed)

        return by_worth if self._config.eviction == "worth" else least_recent

    def tell(self, appraisal: Appraisal, worker: Worker, residents: Sequence[Resident], now_s: float) -> None:
        """What a replica hears of other replicas' requests and copies before it values what it has: nothing."""

    def _appraisal(self) -> Appraisal:
        return Appraisal(Worth(Popularity(), self.loader, WorthConfig()))

    def choose(self, request: Request) -> Worker:
        """As the router does, by its forecast."""
        wanted, now_s = self._wanted(request), self._cluster.clock.now_s
        said = {worker: self._announced(worker, request.base) for worker in self._cluster.workers}
        chosen = choose_replica(
            [self._assignments.candidate(each, wanted, now_s, is_suspect=False) for each in said.values()]
        )
        assert chosen is not None
        worker = self._cluster.workers[int(chosen.replica_id)]
        prepared = None
        if said[worker].tier is not Tier.DEVICE:  # its load begins while the encoder is at the prompt
            prepared = self._assignments.prepare(said[worker], wanted, now_s)
            self._assignments.came(prepared)
        self._sent[request.number] = (self._assignments.send(said[worker], wanted, now_s), prepared)
        return worker

    def _wanted(self, request: Request) -> Wanted:
        return Wanted(
            stage=_STAGE, model_id=request.base, work=_amount(request), size_bytes=float(self._config.model_bytes)
        )

    def _announced(self, worker: Worker, name: str) -> Announced:
        """What the worker's replica would say in the registry."""
        device, scale, tier = worker.shelves[DEVICE], self._config.model_bytes, Tier(worker.tier_of(name))
        return Announced(
            replica_id=f"{worker.worker_id:03}",
            tier=Tier.HOST if tier is Tier.DEVICE and worker.is_loading(name) else tier,  # said once it is loaded
            room_bytes=device.room * scale,
            held=tuple(
                HeldModel(
                    model_id=item.name,
                    size_bytes=item.size * scale,
                    back=next(
                        (tier for tier in (Tier.HOST, Tier.DISK) if item.name in worker.shelves[tier]), Tier.REMOTE
                    ),
                    other_count=self._cluster.holders[DEVICE][item.name] - 1,
                )
                for item in device.items.values()
            ),
        )

    def finished(self, job: Job) -> None:
        """What the router and the replica learn from an answer."""
        now_s, (sent, prepared) = self._cluster.clock.now_s, self._sent.pop(job.request.number)
        if prepared:
            if job.base_s:
                self._assignments.loaded(prepared, job.base_s)
            self._assignments.call_off(prepared)
        self._assignments.answered(sent, now_s)
        self._assignments.close(sent)
        for name in (job.request.base, *(lora.lora_id for lora in job.request.loras)):
            self._appraisals[job.worker_id].worth.add(name, now_s, now_s - job.start_s)


def _amount(request: Request) -> float:
    return request.step_count * request.image_count
