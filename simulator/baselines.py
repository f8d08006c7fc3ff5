"""What Darkroom is compared with: production as it is, and what knows the future."""

import bisect
import hashlib
from collections.abc import Callable, Sequence

from darkroom.policy.eviction import Evict, Resident, enough
from simulator.cluster import Cluster
from simulator.costs import PRODUCTION, Loader, Work
from simulator.fleet import FleetConfig
from simulator.worker import REMOTE, Job, Worker
from simulator.workload import Request

Choose = Callable[["Baseline", Request], Worker]
Order = Callable[["Baseline", int, Resident], float]


class Baseline:
    """Production as it is: requests take turns, loads and all."""

    work = Work()
    max_images = 0

    def __init__(
        self, choose: Choose, order: Order, loader: Loader = PRODUCTION, *, fleet: FleetConfig | None = None
    ) -> None:
        self.loader, self._choose, self._order, self.fleet = loader, choose, order, fleet
        self.free_s: dict[int, float] = {}
        self.counts: dict[str, int] = {}

    def begin(self, cluster: Cluster) -> None:
        """Before the first request."""
        self.cluster = cluster
        self.free_s = {worker.worker_id: 0.0 for worker in cluster.workers}

    def finished(self, job: Job) -> None:
        """A request is answered."""

    def evict(self, tier: int, worker_id: int) -> Evict:
        """What decides on a tier of a worker."""
        del tier

        def in_order(residents: Sequence[Resident], needed: float) -> list[str]:
            ordered = sorted(residents, key=lambda r: (self._order(self, worker_id, r), r.used_s))
            return [resident.name for resident in enough(ordered, needed)]

        return in_order

    def load_s(self, worker: Worker, request: Request) -> float:
        """What the request has to wait for on a worker that is free."""
        tier, size, loader = worker.tier_of(request.base), self.cluster.sizes.base(request.base), self.loader
        seconds = (0.0, loader.bus_s, loader.bus_s + loader.disk_s, loader.bus_s + loader.disk_s + loader.network_s)
        lora_s = 0.0 if worker.is_attached(request) else worker.lora_s(REMOTE) * len(request.loras)
        return size * seconds[tier] + lora_s

    def finish_s(self, worker: Worker, request: Request) -> float:
        """When its turn would come and all is loaded."""
        return max(self.free_s[worker.worker_id], self.cluster.clock.now_s) + self.load_s(worker, request)

    def rewritten(self, request: Request) -> Request:
        """The request itself."""
        return request

    def choose(self, request: Request) -> Worker:
        """Who runs the request."""
        self.counts[request.base] = self.counts.get(request.base, 0) + 1
        worker = self._choose(self, request)
        self.free_s[worker.worker_id] = self.finish_s(worker, request) + self.work.request_s(request)
        return worker


def least_loaded(system: Baseline, request: Request) -> Worker:
    """The worker that is free first, any of several."""
    del request
    now_s, rng = system.cluster.clock.now_s, system.cluster.rng
    return min(system.cluster.up, key=lambda w: (max(system.free_s[w.worker_id], now_s), rng.random()))


def any_worker(system: Baseline, request: Request) -> Worker:
    """Any worker."""
    del request
    return system.cluster.rng.choice(system.cluster.up)


def locality(system: Baseline, request: Request) -> Worker:
    """The worker that would answer first, its load counted in, any of several."""
    rng = system.cluster.rng
    return min(system.cluster.up, key=lambda w: (system.finish_s(w, request), rng.random()))


def homes(system: Baseline, request: Request) -> Worker:
    """One of the model's own two workers, the one that is free first: replicas per model, as pods behind a service."""
    workers, seed = system.cluster.workers, system.cluster.sizes.seed
    digest = hashlib.blake2b(f"{seed} home {request.base}".encode(), digest_size=8).digest()
    first, step = divmod(int.from_bytes(digest, "big"), len(workers) - 1 or 1)
    own = (workers[first % len(workers)], workers[(first + 1 + step) % len(workers)])
    return min(own, key=lambda w: (system.free_s[w.worker_id], w.worker_id))


def by_recency(system: Baseline, worker_id: int, item: Resident) -> float:
    """LRU."""
    del system, worker_id
    return item.used_s


def by_count(system: Baseline, worker_id: int, item: Resident) -> float:
    """LFU: requests so far, over all workers."""
    del worker_id
    return system.counts.get(item.name, 0)


def by_popularity(system: Baseline, worker_id: int, item: Resident) -> float:
    """Requests so far per size, whatever its load costs and however many copies there are."""
    return by_count(system, worker_id, item) / item.size_bytes


class Future:
    """Belady's order: what is asked for again last, goes first. Knows when each base is asked for."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self._arrivals: dict[str, list[float]] = {}
        for request in requests:
            for name in (request.base, *(lora.lora_id for lora in request.loras)):
                self._arrivals.setdefault(name, []).append(request.arrival_s)

    def next_s(self, name: str, now_s: float) -> float:
        """When it is asked for next; infinity for never."""
        arrivals = self._arrivals.get(name, [])
        place = bisect.bisect_right(arrivals, now_s)
        return arrivals[place] if place < len(arrivals) else float("inf")

    def __call__(self, system: Baseline, worker_id: int, item: Resident) -> float:
        """The order of eviction."""
        del worker_id
        return -self.next_s(item.name, system.cluster.clock.now_s)
