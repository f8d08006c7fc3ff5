"""How many workers are up: as many as the work that waits asks for.

The rule for how many is everybody's; where a new one starts, and whether it loads a model before anybody asks, is what
ways to serve differ in. A worker that is stopped loses what is in memory, and its machine's disk stays as it is.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from darkroom.policy.scaling import sites
from darkroom.policy.worth import Tier
from simulator.worker import Worker

if TYPE_CHECKING:
    from simulator.cluster import Cluster

Choose = Callable[["Cluster", Sequence[Worker], str, float], Worker]
"""Of the machines without a worker, the one to start on, for a base model; the last is `start_s`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetConfig:
    """When workers start and stop, and where."""

    choose: Choose
    prepares: bool
    """Whether a new worker loads the model it was started for before a request asks for it."""
    least_count: int = 2
    """Kept up whatever happens."""
    start_s: float = 10.0
    """Until the process serves, as Darkroom's stages take; no model is loaded by then."""
    look_every_s: float = 5.0
    target_s: float = 15.0
    """Of work at each worker, about one request; where there is more, others start."""
    idle_s: float = 300.0
    """How long a worker has nothing to do before it is stopped."""


class Fleet:
    """The workers that are up, of all that there are machines for."""

    def __init__(self, cluster: "Cluster", config: FleetConfig, is_over: Callable[[], bool]) -> None:
        """Starts with the least count up. `is_over`: whether every request is answered."""
        self._cluster, self._config, self._is_over = cluster, config, is_over
        self.up = list(cluster.workers[: config.least_count])
        self._starting: set[int] = set()
        self._busy_s: dict[int, float] = {}
        """When each was last seen at work."""
        self.delays_s: list[float] = []
        """From the decision to start a worker until its first model was on the device."""
        self.up_s = 0.0
        """Of all workers together."""
        self._looked_s = 0.0
        self._look()

    def _look(self) -> None:
        now_s, config = self._cluster.clock.now_s, self._config
        self.up_s += (now_s - self._looked_s) * len(self.up)
        self._looked_s = now_s
        if self._is_over():
            return
        work_s = sum(self._cluster.work.request_s(job.request) for worker in self.up for job in worker.jobs)
        wanted = max(math.ceil(work_s / config.target_s), config.least_count)
        for _ in range(len(self.up) + len(self._starting), min(wanted, len(self._cluster.workers))):
            self._start()
        self._stop_idle(wanted)
        self._cluster.clock.after(config.look_every_s, self._look)

    def _start(self) -> None:
        decided_s, name = self._cluster.clock.now_s, self._most_wanted()
        taken = self._starting.union(worker.worker_id for worker in self.up)
        free = [worker for worker in self._cluster.workers if worker.worker_id not in taken]
        worker = self._config.choose(self._cluster, free, name, self._config.start_s)
        self._starting.add(worker.worker_id)

        def is_warm() -> None:
            self.delays_s.append(self._cluster.clock.now_s - decided_s)

        def serve() -> None:
            self._starting.discard(worker.worker_id)
            self.up = sorted([*self.up, worker], key=lambda each: each.worker_id)
            self._busy_s[worker.worker_id] = self._cluster.clock.now_s
            worker.on_warm = is_warm
            if self._config.prepares:
                worker.prefetch(name, Tier.DEVICE)

        self._cluster.clock.after(self._config.start_s, serve)

    def _most_wanted(self) -> str:
        """The base model that most work waits for."""
        waiting: Counter[str] = Counter()
        for worker in self.up:
            for job in worker.jobs:
                waiting[job.request.base] += (
                    0 if job.start_s else round(1e3 * self._cluster.work.request_s(job.request))
                )
        return max(waiting, key=lambda name: (waiting[name], name))

    def _stop_idle(self, wanted: int) -> None:
        now_s = self._cluster.clock.now_s
        for worker in self.up:
            if worker.is_busy or worker.is_loading_anything:
                self._busy_s[worker.worker_id] = now_s
        idle = [w for w in self.up if now_s - self._busy_s.get(w.worker_id, 0.0) >= self._config.idle_s]
        for worker in idle[: max(len(self.up) - wanted, 0)]:
            worker.stop()
            self.up.remove(worker)


def anywhere(cluster: "Cluster", free: Sequence[Worker], name: str, start_s: float) -> Worker:
    """Any machine, as a scheduler that knows nothing of models takes one."""
    del name, start_s
    return cluster.rng.choice(free)


def warmest(cluster: "Cluster", free: Sequence[Worker], name: str, start_s: float) -> Worker:
    """Where the model would be on the device first."""
    spare = {f"{worker.worker_id:03}": Tier(worker.tier_of(name)) for worker in free}
    best = sites([], cluster.sizes.base(name), cluster.loader, start_s, spare=spare)[0]
    return cluster.workers[int(best.machine)]
