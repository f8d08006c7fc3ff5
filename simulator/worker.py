"""A node with one accelerator: its tiers, its queue, its loads.

A load that overlaps runs beside the accelerator's work, LoRAs beside their base; one that does not is part of the
request's turn. A component is loaded once, however many wait for it.
"""

import random
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from darkroom.policy.eviction import Evict
from simulator.clock import Action, Clock
from simulator.costs import Loader, Sizes, Work
from simulator.device import InRounds, OneByOne, Process, Together
from simulator.links import Link, Transfer
from simulator.shelf import Item, Shelf
from simulator.workload import LoraUse, Request

TIERS = ("device", "host", "disk", "remote")
DEVICE, HOST, DISK, REMOTE = range(4)


@dataclass(slots=True, eq=False)
class Job:
    """A request at its worker."""

    request: Request
    worker_id: int
    tier: int
    """Where its base was when it came, nearest first."""
    missing_count: int = 0
    """Components it still waits for."""
    base_s: float = 0.0
    """When its base was on the device, if it waited for that; else 0."""
    start_s: float = 0.0
    finish_s: float = 0.0
    held: list[Item] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _Load:
    name: str
    size: float
    since_s: float
    jobs: list[Job] = field(default_factory=list)


class Worker:
    """One node of the cluster."""

    def __init__(
        self,
        worker_id: int,
        clock: Clock,
        *,
        rooms: Sequence[float],
        evicts: Sequence[Evict],
        holders: Sequence[Counter[str]],
        loader: Loader,
        work: Work,
        sizes: Sizes,
        store: Link | None,
        cores: Link | None,
        max_images: int,
        finished: Callable[[Job], None],
        rng: random.Random,
    ) -> None:
        """`rooms`, `evicts`, `holders`: of device, host and disk. `store`: the link by which all nodes fetch.

        `cores`: what computes where there are no accelerators, loads from disk included; then requests run together.
        """
        self.worker_id, self._clock, self._loader, self._work, self._sizes = worker_id, clock, loader, work, sizes
        self.shelves = [Shelf(*shelf) for shelf in zip(rooms, evicts, holders, strict=True)]
        self.network, self.disk, self.bus = (
            Link(name, 1 / seconds) if seconds else None
            for name, seconds in (("network", loader.network_s), ("disk", loader.disk_s), ("bus", loader.bus_s))
        )
        self._store, self._finished, self._rng = store, finished, rng
        self._process = Process(clock, cores) if cores else None
        self.load_counts = [0, 0, 0, 0]
        self.load_seconds: list[float] = []
        self.on_warm: Action | None = None
        """Called once, when the next model is on the device."""
        self.jobs: dict[Job, None] = {}
        """Those that are not finished."""
        self._loads: dict[str, _Load] = {}
        self._coming: set[str] = set()
        self._without_room: deque[_Load] = deque()
        self._waiting_for_lora: dict[str, list[Job]] = {}
        """Requests by the LoRA that is on its way to them."""
        self._attached: dict[str, tuple[LoraUse, ...]] = {}
        self._turns: deque[Job] = deque()
        self._has_turn: Job | None = None
        self.device = self._accelerator(max_images)

    def _accelerator(self, max_images: int) -> Together[Job] | OneByOne[Job] | InRounds[Job]:
        clock, work, started, ended = self._clock, self._work, self._started, self._ended
        if self._process:
            return InRounds(clock, work, started, ended, max_images=max_images, process=self._process)
        if max_images:
            return Together(clock, work, started, ended, max_images=max_images)
        return OneByOne(clock, work, started, ended)

    def tier_of(self, name: str) -> int:
        """The nearest tier that holds a component."""
        for tier, shelf in enumerate(self.shelves):
            if name in shelf:
                return tier
        return REMOTE

    def is_loading(self, name: str) -> bool:
        """Whether it is on its way to the device."""
        return name in self._loads

    def is_bringing(self, name: str) -> bool:
        """Whether it is on its way to any tier."""
        return name in self._loads or name in self._coming

    def submit(self, request: Request) -> Job:
        """Takes a request in."""
        job = Job(request, self.worker_id, self.tier_of(request.base))
        self.jobs[job] = None
        if self._loader.overlaps:
            self._prepare(job)
        else:
            self._turns.append(job)
            self._next_turn()
        return job

    @property
    def is_busy(self) -> bool:
        """Whether anybody waits for it."""
        return bool(self.jobs)

    @property
    def is_loading_anything(self) -> bool:
        """Whether something is on its way here."""
        return bool(self._loads or self._coming)

    def prefetch(self, name: str, tier: int) -> None:
        """Brings a base to a tier although nobody has asked for it there yet."""
        if self.tier_of(name) <= tier or self.is_bringing(name):
            return
        if tier == DEVICE:
            self._load(name)
        else:
            size = self._sizes.base(name)
            link = self.disk if tier == HOST else self.network
            self.load_counts[self.tier_of(name)] += tier == DISK
            self._coming.add(name)
            self._move(link, size, lambda: self._came(name, size, tier))

    def _came(self, name: str, size: float, tier: int) -> None:
        self._coming.discard(name)
        self.shelves[tier].put(name, size, self._clock.now_s)

    def stop(self) -> None:
        """Its process ends, idle: memory is lost, the disk stays."""
        for shelf in self.shelves[:DISK]:
            for name in list(shelf.items):
                shelf.drop(name)
        self._attached.clear()
        self.on_warm = None

    # In turns: each request loads what it needs, then runs.

    def _next_turn(self) -> None:
        if self._has_turn or not self._turns:
            return
        job = self._has_turn = self._turns.popleft()
        if self._is_on_device(job.request.base):
            self._use(job, job.request.base)
            self._attach_in_turn(job)
        else:
            job.missing_count = 1
            self._wait_for_base(job)

    def _attach_in_turn(self, job: Job) -> None:
        request = job.request
        is_on = not request.loras or self._attached.get(request.base) == request.loras
        self._attached[request.base] = request.loras
        seconds = 0.0 if is_on else self.lora_s(REMOTE) * len(request.loras)
        self._clock.after(seconds, lambda: self.device.add(job))

    def lora_s(self, tier: int) -> float:
        """Seconds to bring a LoRA from a tier and put it on its base."""
        loader, size = self._loader, self._sizes.lora
        if tier == DEVICE:
            return 0.0
        return loader.attach_s + size * (
            (loader.disk_s if tier >= DISK else 0.0) + (loader.network_s if tier == REMOTE else 0.0)
        )

    def is_attached(self, request: Request) -> bool:
        """Whether the base has the request's LoRAs on it, where requests take turns."""
        return not request.loras or (
            request.base in self.shelves[DEVICE] and self._attached.get(request.base) == request.loras
        )

    # Beside each other: loads begin as requests come, and who has all that it needs runs.

    def _prepare(self, job: Job) -> None:
        request = job.request
        job.missing_count = 1 + len(request.loras)
        if self._is_on_device(request.base) and not self._without_room:
            self._use(job, request.base)
            self._arrived(job)
        else:
            self._wait_for_base(job)
        for lora in request.loras:
            self._want_lora(job, lora.lora_id)

    def _want_lora(self, job: Job, name: str) -> None:
        tier = self.tier_of(name)
        if name in self._waiting_for_lora:
            self._waiting_for_lora[name].append(job)
        elif tier == DEVICE:
            self._arrived(job)
        else:
            self._waiting_for_lora[name] = [job]
            if tier == REMOTE:
                self._move(self.network, self._sizes.lora, lambda: self._read_lora(name))
            elif tier == DISK:
                self._read_lora(name)
            else:
                self._attach(name)

    def _read_lora(self, name: str) -> None:
        self._move(self.disk, self._sizes.lora, lambda: self._attach(name))

    def _attach(self, name: str) -> None:
        self._clock.after(self._loader.attach_s, lambda: self._lora_came(name))

    def _lora_came(self, name: str) -> None:
        for shelf in self.shelves:
            shelf.put(name, self._sizes.lora, self._clock.now_s)
        for job in self._waiting_for_lora.pop(name):
            self._arrived(job)

    def _arrived(self, job: Job) -> None:
        job.missing_count -= 1
        if not job.missing_count:
            self.device.add(job)

    # Loads.

    def _is_on_device(self, name: str) -> bool:
        """All of it: its place is taken before it has come over the bus."""
        return name in self.shelves[DEVICE] and name not in self._loads

    def _wait_for_base(self, job: Job) -> None:
        base = job.request.base
        (self._loads.get(base) or self._load(base)).jobs.append(job)

    def _load(self, name: str) -> _Load:
        load = self._loads[name] = _Load(name, self._sizes.base(name), self._clock.now_s)
        tier = self.tier_of(name)
        self.load_counts[tier] += 1
        if tier == REMOTE:
            self._move(self.network, load.size, lambda: self._fetched(load))
        elif tier == DISK:
            self._read(load)
        else:
            self._on_host(load)
        return load

    def _fetched(self, load: _Load) -> None:
        self.shelves[DISK].put(load.name, load.size, self._clock.now_s)
        if self._loader.is_streaming:
            self._on_host(load)
        else:
            self._read(load)

    def _read(self, load: _Load) -> None:
        spread = self._loader.spread
        usual_share = self._rng.lognormvariate(0.0, spread) if spread else 1.0
        self._move(self.disk, load.size * usual_share, lambda: self._on_host(load))

    def _on_host(self, load: _Load) -> None:
        self.shelves[HOST].put(load.name, load.size, self._clock.now_s)
        self._without_room.append(load)
        self._place()

    def _place(self) -> None:
        """Moves what waits to the device, as far as there is room, in the order in which it came."""
        while self._without_room:
            load = self._without_room[0]
            item = self.shelves[DEVICE].put(load.name, load.size, self._clock.now_s)
            if item is None:
                return
            self._without_room.popleft()
            item.use_count += 1
            self._move(self.bus, load.size, partial(self._loaded, load, item))

    def _loaded(self, load: _Load, item: Item) -> None:
        del self._loads[load.name]
        self.load_seconds.append(self._clock.now_s - load.since_s)
        item.use_count -= 1
        if self.on_warm:
            warm, self.on_warm = self.on_warm, None
            warm()
        for job in load.jobs:
            job.base_s = self._clock.now_s
            self._use(job, load.name)
            if self._loader.overlaps:
                self._arrived(job)
            else:
                self._attach_in_turn(job)
        self._place()

    def _move(self, link: Link | None, size: float, done: Action) -> None:
        if link is None:
            self._clock.after(0.0, done)
        elif self._process and link is self.disk:
            self._process.run(size / link.rate, done)
        else:
            links = (link, self._store) if self._store and link is self.network else (link,)
            Transfer(self._clock, links, size, done)

    # Turns of the accelerator.

    def _use(self, job: Job, name: str) -> None:
        now_s = self._clock.now_s
        item = self.shelves[DEVICE].items[name]
        item.use_count += 1
        job.held.append(item)
        for shelf in self.shelves:
            shelf.touch(name, now_s)

    def _started(self, job: Job) -> None:
        job.start_s = self._clock.now_s

    def _ended(self, job: Job, seconds: float) -> None:
        for item in job.held:
            item.use_count -= 1
        job.finish_s = self._clock.now_s + seconds
        del self.jobs[job]
        self._finished(job)
        if self._has_turn is job:
            self._has_turn = None
            self._next_turn()
        self._place()
