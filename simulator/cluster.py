"""Replays a workload on workers, by one way to serve."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from darkroom.policy.eviction import Evict
from simulator.clock import Clock
from simulator.costs import Loader, Sizes, Work
from simulator.fleet import Fleet, FleetConfig
from simulator.links import Link
from simulator.worker import DISK, Job, Worker
from simulator.workload import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """What every way to serve gets alike."""

    worker_count: int = 24
    rooms: tuple[float, float, float] = (1.42, 3.0, 12.0)
    """Of device, host and disk, in median bases: a device holds one of any size, the others 3 and 12 of the median."""
    store_share: float = 0.0
    """What the remote store gives all nodes together, in nodes' network cards; 0 without bound."""
    core_count: float = 0.0
    """CPU cores that all workers share, as a cluster on one machine does; 0 gives each an accelerator of its own."""


class Service(Protocol):
    """A way to serve: what it costs to load and run, who runs a request, what leaves a tier."""

    loader: Loader
    work: Work
    max_images: int
    fleet: FleetConfig | None
    """None keeps every worker up."""

    def evict(self, tier: int, worker_id: int) -> Evict:
        """What decides on a tier of a worker."""

    def begin(self, cluster: "Cluster") -> None:
        """Before the first request."""

    def rewritten(self, request: Request) -> Request:
        """The request as workers get it."""

    def choose(self, request: Request) -> Worker:
        """Who runs the request."""

    def finished(self, job: Job) -> None:
        """A request is answered."""


class Cluster:
    """Workers on a virtual clock."""

    def __init__(self, service: Service, hardware: Hardware, sizes: Sizes, *, seed: int) -> None:
        self.clock, self.hardware, self.sizes, self.rng = Clock(), hardware, sizes, random.Random(seed)
        self._service = service
        self.fleet: Fleet | None = None
        self.loader, self.work = service.loader, service.work
        loader = self.loader
        is_bounded = hardware.store_share and loader.network_s
        store = Link("store", hardware.store_share / loader.network_s) if is_bounded else None
        cores = Link("cores", hardware.core_count) if hardware.core_count else None
        self.jobs: list[Job] = []
        self.holders: list[Counter[str]] = [Counter(), Counter(), Counter()]
        """By tier: how many workers hold each component."""
        self.workers = [
            Worker(
                worker_id,
                self.clock,
                rooms=hardware.rooms,
                evicts=[service.evict(tier, worker_id) for tier in range(3)],
                holders=self.holders,
                loader=loader,
                work=service.work,
                sizes=sizes,
                store=store,
                cores=cores,
                max_images=service.max_images,
                finished=self._finished,
                rng=self.rng,
            )
            for worker_id in range(hardware.worker_count)
        ]
        service.begin(self)

    @property
    def up(self) -> list[Worker]:
        """The workers that take requests, by id."""
        return self.fleet.up if self.fleet else self.workers

    def held_count(self, tier: int, name: str) -> int:
        """How many workers that are up hold a component on a tier: the disks of others are of no use to anybody."""
        if self.fleet is None or tier != DISK:
            return self.holders[tier][name]
        return sum(name in worker.shelves[tier] for worker in self.fleet.up)

    def _finished(self, job: Job) -> None:
        self.jobs.append(job)
        self._service.finished(job)

    def replay(self, requests: Sequence[Request]) -> list[Job]:
        """Runs all of them. Returns their jobs in the order in which they ended."""
        waiting = iter(requests)
        if self._service.fleet:
            self.fleet = Fleet(self, self._service.fleet, lambda: len(self.jobs) == len(requests))

        def arrive(request: Request | None) -> None:
            if request:
                asked = self._service.rewritten(request)
                self._service.choose(asked).submit(asked)
            following = next(waiting, None)
            if following:
                self.clock.at(following.arrival_s, lambda: arrive(following))

        arrive(None)
        self.clock.run()
        if len(self.jobs) != len(requests):
            raise AssertionError(f"{len(requests) - len(self.jobs)} requests were never answered")
        return self.jobs
