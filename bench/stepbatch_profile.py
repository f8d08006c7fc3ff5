"""Where the engine's time goes: seconds of each part of it, without those of the parts inside.

Not cProfile: it keeps one stack per thread, which greenlets that take turns would turn into nonsense. Here only what
never leaves its greenlet is timed inside of one.
"""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers

from bench.stepbatch_mix import SCHEDULERS
from darkroom.models import batches, executor, forwards, journal, program, standins
from darkroom.policy.cost import CostCurve
from darkroom.schedulers import scheduler_choice

_ENGINE: tuple[tuple[str, Any, tuple[str, ...]], ...] = (
    ("arrivals, waiting", executor.Executor, ("_take_arrivals",)),
    ("slots, the unwanted", executor.Executor, ("_end_unwanted", "_fill_slots")),
    ("choice of the batch", executor, ("choose_batch", "_place_in_line")),
    ("counts", executor.Executor, ("_count", "_took")),
    ("cost curve", CostCurve, ("add",)),
    ("rest of a batch's round", executor.Executor, ("_run_next_batch",)),
    ("merging and splitting", batches, ("run_batch",)),
    ("pipeline's code, switches", program.Program, ("resume",)),
    ("place in line", program.Program, ("wait",)),
    ("reading the call", standins, ("Forward",)),
    ("journal", journal.Journal, ("_note", "saw")),
    ("snapshots", journal.Journal, ("_snapshot",)),
)
NETWORK = "network"


@dataclass(slots=True)
class Ledger:
    """Seconds and calls by name, of one thread. What a timed call calls in turn is booked under its own name only."""

    seconds: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    _inside_s: list[float] = field(default_factory=list)
    """Of each timed call under way: seconds of the timed calls inside it."""

    def timed(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        """The same, with its time booked."""

        @functools.wraps(real, updated=())
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._inside_s.append(0.0)
            start_s = time.perf_counter()
            try:
                return real(*args, **kwargs)
            finally:
                took_s = time.perf_counter() - start_s
                self.seconds[name] = self.seconds.get(name, 0.0) + took_s - self._inside_s.pop()
                self.counts[name] = self.counts.get(name, 0) + 1
                if self._inside_s:
                    self._inside_s[-1] += took_s

        return timed

    def watch(self, owner: Any, method: str, name: str) -> None:
        """Times every call of `owner.method`, of a class or module, from now on."""
        setattr(owner, method, self.timed(name, getattr(owner, method)))

    def read(self) -> dict[str, tuple[float, int]]:
        """Seconds and calls by name since the last reading."""
        read = {name: (seconds, self.counts[name]) for name, seconds in self.seconds.items()}
        self.seconds.clear()
        self.counts.clear()
        return read


def watch_engine(ledger: Ledger) -> None:
    """Times the parts of every engine that this process makes from now on."""
    for name, owner, methods in _ENGINE:
        for method in methods:
            ledger.watch(owner, method, name)
    for scheduler in SCHEDULERS:
        ledger.watch(getattr(diffusers, scheduler_choice(scheduler).class_name), "step", "scheduler")
    ledger.watch(diffusers.UNet2DConditionModel, "forward", NETWORK)
    ledger.watch(forwards, "_content", "digests of shared tensors")
