"""Darkroom on a large cluster as its services run it: forecasts, plans with orders, values that replicas are told.

Where `ours` knows everything at once, here the router knows what it has sent and been answered, replicas know what ran
on them and what the last plan said, and orders wait until a replica has time for them. What is left out: reports and
announcements take no time, nothing is lost on the way, and there is one router.
"""

from collections.abc import Sequence

from darkroom.policy.appraisal import Appraisal, Asked
from darkroom.policy.cacheplan import NO_PLAN, Order
from darkroom.policy.eviction import Resident
from darkroom.policy.planning import MAIN_STAGE, CacheReplica, Planned, Situation, make_plan
from darkroom.policy.popularity import Popularity
from darkroom.policy.worth import Tier, Worth, WorthConfig
from simulator.cluster import Cluster
from simulator.live import Live, LiveConfig
from simulator.worker import Job, Worker
from simulator.workload import Request

PLAN_EVERY_S = 5.0
"""As a cache manager does unless told otherwise."""
_PATIENCE_S = 30.0
"""How long an order to a device waits for its replica to be idle, as in `darkroom/runtime/following.py`."""


class Served(Live):
    """The services' policies and what they tell each other."""

    def __init__(self, config: LiveConfig, requests: Sequence[Request], planned: Planned | None) -> None:
        """`planned`: None makes no plans."""
        super().__init__(config)
        self._planned, self._left = planned, len(requests)
        self._names = sorted({request.base for request in requests})
        self._usage = Worth(Popularity(), config.loader, WorthConfig())
        """What the cache manager has heard of requests."""
        self._plan = NO_PLAN
        self._since_s: dict[Order, float] = {}
        """Since when orders wait."""
        self._begun: set[Order] = set()
        self._bringing: dict[int, str] = {}
        """By worker, what it brings for the plan."""

    def begin(self, cluster: Cluster) -> None:
        """Before the first request."""
        super().begin(cluster)
        self._sizes = {name: cluster.sizes.base(name) for name in self._names}
        if self._planned:
            cluster.clock.after(PLAN_EVERY_S, self._replan)

    def finished(self, job: Job) -> None:
        """The router reports what was used, and the replica may have time for what the plan asks."""
        super().finished(job)
        self._left -= 1
        now_s = self._cluster.clock.now_s
        self._usage.add(job.request.base, now_s, now_s - job.start_s)
        self._follow(self._cluster.workers[job.worker_id])

    def tell(self, appraisal: Appraisal, worker: Worker, residents: Sequence[Resident], now_s: float) -> None:
        """What the last plan said of the whole cluster, and who else has copies now."""
        seen = self._plan.asked_at(MAIN_STAGE, {})
        others = {
            resident.name: tuple(
                holders[resident.name] - (resident.name in shelf)
                for holders, shelf in zip(self._cluster.holders, worker.shelves, strict=True)
            )
            for resident in residents
        }
        asked = {
            name: Asked(rate=seen[name].rate, run_s=seen[name].run_s, others=(held[0], held[1], held[2]))
            for name, held in others.items()
            if name in seen
        }
        appraisal.tell(asked, now_s + PLAN_EVERY_S)

    def _replan(self) -> None:
        if not self._left:
            return
        assert self._planned
        now_s = self._cluster.clock.now_s
        situation = Situation(
            replicas=[self._replica(worker) for worker in self._cluster.workers],
            sizes={MAIN_STAGE: self._sizes},
            worths={MAIN_STAGE: self._usage},
            before=self._plan,
        )
        self._plan = make_plan(situation, now_s, self._planned)
        standing = [order for order in self._plan.orders if not order.is_done]
        self._since_s = {order: self._since_s.get(order, now_s) for order in standing}
        self._begun.intersection_update(standing)
        for worker in self._cluster.workers:
            self._follow(worker)
        self._cluster.clock.after(PLAN_EVERY_S, self._replan)

    def _replica(self, worker: Worker) -> CacheReplica:
        device, host, disk = (
            {item.name: item.size for item in shelf.items.values() if item.name in self._sizes}
            for shelf in worker.shelves
        )
        return CacheReplica(
            replica_id=f"{worker.worker_id:03}",
            stage=MAIN_STAGE,
            is_idle=not worker.is_busy,
            rooms=self._cluster.hardware.rooms,
            held=(device, host, disk),
        )

    def _follow(self, worker: Worker) -> None:
        """Begins with one thing that is to come, as soon as the one before is there."""
        bringing = self._bringing.get(worker.worker_id)
        if bringing is not None and worker.is_bringing(bringing):
            return
        now_s = self._cluster.clock.now_s
        for order in self._plan.orders_of(f"{worker.worker_id:03}"):
            if order.is_done or order in self._begun or order.until_s <= now_s:
                continue
            if order.tier is not Tier.DEVICE or not worker.is_busy or now_s - self._since_s[order] > _PATIENCE_S:
                self._begun.add(order)
                self._bringing[worker.worker_id] = order.model_id
                worker.prefetch(order.model_id, order.tier)
                return
