"""Darkroom's own policies, as its services run them, on simulated workers."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from darkroom.policy.eviction import Evict, Resident, least_recent, least_valuable
from darkroom.policy.placement import Candidate, choose_replica
from darkroom.policy.plan import Node, PlanConfig, plan_moves
from darkroom.policy.popularity import WINDOWS_S, Popularity
from darkroom.policy.prefetch import BanditConfig
from darkroom.policy.worth import Tier, Worth, WorthConfig
from simulator.baselines import Future
from simulator.cluster import Cluster
from simulator.costs import DIRECT, Loader, Work
from simulator.fleet import FleetConfig
from simulator.habits import Hours
from simulator.merging import Merging
from simulator.worker import DEVICE, Job, Worker
from simulator.workload import Request

_HELD = (Tier.DEVICE, Tier.HOST, Tier.DISK)


@dataclass(frozen=True, slots=True, kw_only=True)
class DarkroomConfig:
    """Which parts are on."""

    loader: Loader = DIRECT
    work: Work = field(default_factory=Work)
    max_images: int = 0
    """Of a batch; 0 serves one request after the other."""
    eviction: Literal["worth", "recency", "future"] = "worth"
    """What leaves a tier; `future` knows it, as no service can."""
    plan_every_s: float = 15.0
    """0 makes no plans."""
    windows_s: tuple[float, ...] = WINDOWS_S
    worth: WorthConfig = field(default_factory=WorthConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    displaced_weight: float = 0.3
    """Of what later requests lose, against what this one does."""
    bandit: BanditConfig | None = None
    """Brings warm models near by the hour of the day."""
    merges: bool = False
    """Keeps the most valuable pairs of base and LoRAs merged."""
    fleet: FleetConfig | None = None
    """None keeps every worker up."""


class Darkroom:
    """The services' policies."""

    def __init__(self, config: DarkroomConfig, requests: Sequence[Request]) -> None:
        self.loader, self.work, self.max_images = config.loader, config.work, config.max_images
        self.fleet = config.fleet
        self._config, self._left, self._future = config, len(requests), Future(requests)
        self._worth = Worth(Popularity(config.windows_s), config.loader, config.worth)
        self._free_s: dict[int, float] = {}
        self._asked: dict[str, float] = {}
        self._habits: Hours | None = None
        self._merging: Merging | None = None

    def begin(self, cluster: Cluster) -> None:
        """Before the first request."""
        self._cluster = cluster
        self._free_s = {worker.worker_id: 0.0 for worker in cluster.workers}
        if self._config.plan_every_s:
            cluster.clock.after(self._config.plan_every_s, self._plan)
        if self._config.bandit:
            self._habits = Hours(self._config.bandit, cluster, self._worth)
            cluster.clock.after(self._config.bandit.slot_s, self._next_slot)
        if self._config.merges:
            self._merging = Merging(self.loader, lora_s=0.0)

    def _next_slot(self) -> None:
        if self._left and self._habits and self._config.bandit:
            self._habits.next_slot()
            self._cluster.clock.after(self._config.bandit.slot_s, self._next_slot)

    def finished(self, job: Job) -> None:
        """A request is answered."""
        del job
        self._left -= 1

    def evict(self, tier: int, worker_id: int) -> Evict:
        """What decides on a tier of a worker."""

        def by_worth(residents: Sequence[Resident], needed: float) -> list[str]:
            now_s = self._cluster.clock.now_s
            return least_valuable(
                [
                    replace(r, value_s=self._value_s(worker_id, r.name, r.size_bytes, Tier(tier), now_s))
                    for r in residents
                ],
                needed,
            )

        def by_future(residents: Sequence[Resident], needed: float) -> list[str]:
            now_s = self._cluster.clock.now_s
            return least_recent([replace(r, used_s=-self._future.next_s(r.name, now_s)) for r in residents], needed)

        return {"worth": by_worth, "recency": least_recent, "future": by_future}[self._config.eviction]

    def rewritten(self, request: Request) -> Request:
        """The request as workers get it: for a pair that is kept merged, without its LoRAs."""
        return self._merging.rewritten(request, self._cluster.clock.now_s) if self._merging else request

    def choose(self, request: Request) -> Worker:
        """Who runs the request."""
        now_s = self._cluster.clock.now_s
        run_s = self.work.request_s(request)
        self._asked.setdefault(request.base, self._cluster.sizes.base(request.base))
        self._worth.add(request.base, now_s, run_s)
        for lora in request.loras:
            self._worth.add(lora.lora_id, now_s, run_s)
        placed = choose_replica([self._candidate(worker, request, run_s, now_s) for worker in self._cluster.up])
        assert placed is not None
        worker = self._cluster.workers[int(placed.replica_id)]
        self._free_s[worker.worker_id] = now_s + placed.finish_s
        if self._habits:
            self._habits.used(request.base, worker)
        return worker

    def _candidate(self, worker: Worker, request: Request, run_s: float, now_s: float) -> Candidate:
        size, times = self._asked[request.base], self._worth.times
        tier = worker.tier_of(request.base)
        is_coming = worker.is_loading(request.base)
        prepare_s = 0.0 if is_coming else size * times.prepare_s(Tier(tier))
        for lora in request.loras:
            prepare_s = max(prepare_s, worker.lora_s(worker.tier_of(lora.lora_id)))
        displaced_s = 0.0
        if tier != DEVICE and not is_coming and self._config.displaced_weight:
            for item in worker.shelves[DEVICE].items.values():
                if item.name not in self._asked:
                    continue  # a LoRA: next to nothing
                displaced_s += self._value_s(worker.worker_id, item.name, item.size, Tier.DEVICE, now_s)
        return Candidate(
            replica_id=f"{worker.worker_id:03}",
            queue_s=max(self._free_s[worker.worker_id] - now_s, 0.0),
            prepare_s=prepare_s,
            swap_s=0.0 if tier == DEVICE else size * times.bus_s,
            run_s=run_s,
            displaced_s=self._config.displaced_weight * displaced_s,
        )

    def _value_s(self, worker_id: int, name: str, size: float, tier: Tier, now_s: float) -> float:
        """Of the copy that a worker would drop."""
        shelves = self._cluster.workers[worker_id].shelves
        kept = [other for other in _HELD if other != tier and name in shelves[other]]
        others = self._cluster.held_count(tier, name) - 1
        missed = self._worth.missed_share(name, tier, others, now_s)
        return size * missed * self._worth.times.back_s(tier, kept)

    def _plan(self) -> None:
        if not self._left:
            return
        now_s = self._cluster.clock.now_s
        nodes = [self._node(worker) for worker in self._cluster.up]
        for move in plan_moves(nodes, self._asked, self._worth, now_s, self._config.plan):
            self._cluster.workers[int(move.node_id)].prefetch(move.name, move.tier)
        if self._merging:
            self._merging.choose(self._least_lost(nodes, now_s), now_s)
        self._cluster.clock.after(self._config.plan_every_s, self._plan)

    def _least_lost(self, nodes: Sequence[Node], now_s: float) -> float:
        """Seconds per second that requests lose by the least valuable base in any host memory."""
        names = {name for node in nodes for name in node.held[Tier.HOST] if name in self._asked}
        horizon_s = self._config.worth.horizons_s[Tier.HOST]
        holders = self._cluster.holders[Tier.HOST]
        missed = [self._worth.missed_share(name, Tier.HOST, holders[name] - 1, now_s) for name in names]
        return min(missed, default=0.0) * self._worth.times.disk_s / horizon_s

    def _node(self, worker: Worker) -> Node:
        held = tuple({item.name: item.size for item in shelf.items.values()} for shelf in worker.shelves)
        in_use = frozenset(item.name for item in worker.shelves[DEVICE].items.values() if item.use_count)
        return Node(
            node_id=f"{worker.worker_id:03}",
            is_idle=not worker.is_busy,
            is_loading=worker.is_loading_anything,
            rooms=self._cluster.hardware.rooms,
            held=held,
            busy_names=in_use,
        )
