"""Runs a chosen batch of forwards: timed, halved when memory runs out, call by call when one of them is at fault."""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from darkroom.models.forwards import Forward, run_batch
from darkroom.policy.cost import CostCurve

_LIMIT_LIFETIME_S = 60.0
"""How long a batch size that did not fit is avoided: what filled the memory may have gone since."""
_PATIENCE_S, _PATIENCE_FACTOR = 3.0, 5.0
_UNKNOWN_PATIENCE_S = 300.0
"""A network's first forward may compile, allocate, and page in gigabytes."""
_MAX_KEYS = 1024


_PROBE_SIZES = (1, 2, 4, 8, 16)
_MAX_PROBES = 8
_MAX_PROBE_S = 0.25
"""Who arrives during a probe waits for it."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of some of the forwards, by their positions in the batch: an answer each, or what it raised."""

    positions: tuple[int, ...]
    answers: list[Any]
    seconds: float


@dataclass(slots=True)
class _Probe:
    """A call to measure with, and how many of it at once, the next one last: each size twice, once is no measure."""

    call: Forward
    sizes: list[int]


@dataclass(frozen=True, slots=True)
class _Batch:
    """What the cost curves ask of calls of equal key."""

    cost_key: Any
    kind: Any
    rows: int
    is_beside: bool
    """Whether anything is added beside the network's weights, to any of them."""

    @classmethod
    def of(cls, calls: Sequence[Forward]) -> _Batch:
        is_beside = any(call.adapter is not None and call.adapter.is_beside for call in calls)
        return cls(calls[0].cost_key, calls[0].kind, sum(call.rows for call in calls), is_beside)


class BatchRunner:
    """Runs batches on the engine's thread and keeps the cost curve current."""

    def __init__(self, costs: CostCurve, *, max_probe_rows: int = 0) -> None:
        """`costs` learns from every batch. `max_probe_rows`: largest size that `probe` tries; 0 probes nothing."""
        self._costs, self._max_probe_rows = costs, max_probe_rows
        self._apart = {False: CostCurve(), True: CostCurve()}
        """By kind and not by cost key: of batches in which nothing was added beside the weights, and of others."""
        self._probes: OrderedDict[Any, _Probe] = OrderedDict()
        self._known: OrderedDict[Any, None] = OrderedDict()
        """Keys that have run, latest last: what others of a build cost says nothing of a first forward."""
        self._limits: dict[Any, tuple[int, float]] = {}
        self._busy: tuple[float, float] | None = None
        self._unread: deque[tuple[_Batch, torch.cuda.Event, torch.cuda.Event]] = deque()

    def overdue_s(self, now_s: float) -> float:
        """How long ago the running batch should have been done at the latest; negative when it is in time or idle."""
        busy = self._busy
        return -1.0 if busy is None else now_s - busy[0] - busy[1]

    def row_limits(self, now_s: float) -> Mapping[Any, int]:
        """Rows that fitted where more did not, by key."""
        for key in [key for key, (_, until_s) in self._limits.items() if until_s <= now_s]:
            del self._limits[key]
        return {key: rows for key, (rows, _) in self._limits.items()}

    def run(self, calls: Sequence[Forward]) -> Iterator[Outcome]:
        """Runs calls of equal key together, or in as few batches as memory allows. Each call comes up once."""
        left, size = tuple(range(len(calls))), len(calls)
        while left:
            positions, chosen = left[:size], [calls[position] for position in left[:size]]
            try:
                answers, seconds = self._timed(chosen)
            except Exception as error:  # noqa: BLE001 - whatever a network raised belongs to the programs that called it
                if len(chosen) > 1:
                    size = self._smaller(chosen, error)
                    continue
                answers, seconds = [error], 0.0
            yield Outcome(positions, answers, seconds)
            left = left[size:]

    def usual_s(self, calls: Sequence[Forward]) -> float | None:
        """Seconds that a batch of these usually takes, by whether anything is added beside weights in it."""
        batch = _Batch.of(calls)
        return self._apart[batch.is_beside].seconds(batch.kind, batch.rows)

    def bare_s(self, call: Forward) -> float | None:
        """Seconds that a call by itself takes where nothing is added beside the weights; None if that never ran."""
        return self._apart[False].seconds(call.kind, call.rows)

    @property
    def has_probes(self) -> bool:
        """Whether there is a kind of forward whose cost at other sizes is not known yet."""
        return bool(self._probes)

    def probe(self) -> None:
        """Measures one size of a kind seen lately, by running one of its calls several times over: for idle moments."""
        key, probe = self._probes.popitem(last=False)
        size = probe.sizes.pop()
        expected_s = self._costs.seconds(key, size * probe.call.rows) or 0.0
        if expected_s > _MAX_PROBE_S:
            return
        try:
            self._timed([probe.call] * size)
        except Exception:  # noqa: BLE001 - too large for memory, or whatever: then nothing is known of larger ones either
            return
        if probe.sizes:
            self._probes[key] = probe

    def _note_for_probes(self, kind: Any, call: Forward) -> None:
        """Notes a call without its adapter, where what that costs is not known."""
        sizes = [size for size in _PROBE_SIZES if size * call.rows <= self._max_probe_rows]
        if sizes and kind not in self._probes and not self._apart[False].is_known(kind):
            self._probes[kind] = _Probe(call.bare(), [size for size in reversed(sizes) for _ in range(2)])
            if len(self._probes) > _MAX_PROBES:
                self._probes.popitem(last=False)

    def _smaller(self, failed: Sequence[Forward], error: Exception) -> int:
        """How many calls to try together after these failed: half as many for want of memory, else one by one."""
        if not _is_out_of_memory(error):
            return 1
        size = (len(failed) + 1) // 2
        rows = sum(call.rows for call in failed[:size])
        self._limits[failed[0].key] = (rows, time.monotonic() + _LIMIT_LIFETIME_S)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return size

    def _timed(self, calls: list[Forward]) -> tuple[list[Any], float]:
        batch = _Batch.of(calls)
        expected_s = self._costs.seconds(batch.cost_key, batch.rows)
        known_s = expected_s if calls[0].key in self._known else None
        patience_s = _UNKNOWN_PATIENCE_S if known_s is None else max(_PATIENCE_S, _PATIENCE_FACTOR * known_s)
        self._read_events()
        self._note_for_probes(batch.kind, calls[0])
        start_s = time.monotonic()
        self._busy = (start_s, patience_s)
        try:
            if not _is_on_gpu(calls[0]):
                answers = run_batch(calls)
                seconds = time.monotonic() - start_s
                self._learn(batch, seconds)
                self._note_run(calls[0].key)
                return answers, seconds
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            answers = run_batch(calls)
            end.record()
            self._unread.append((batch, begin, end))
            self._note_run(calls[0].key)
            return answers, expected_s or 0.0
        finally:
            self._busy = None

    def _read_events(self) -> None:
        """On a GPU a call returns before its work is done: times are read once they are there, nothing waits."""
        while self._unread and self._unread[0][2].query():
            batch, begin, end = self._unread.popleft()
            self._learn(batch, begin.elapsed_time(end) / 1000)

    def _note_run(self, key: Any) -> None:
        self._known[key] = None
        self._known.move_to_end(key)
        if len(self._known) > _MAX_KEYS:
            self._known.popitem(last=False)

    def _learn(self, batch: _Batch, seconds: float) -> None:
        self._costs.add(batch.cost_key, batch.rows, seconds)
        self._apart[batch.is_beside].add(batch.kind, batch.rows, seconds)


def _is_on_gpu(call: Forward) -> bool:
    return any(isinstance(leaf, torch.Tensor) and leaf.is_cuda for leaf in call.leaves)


def _is_out_of_memory(error: Exception) -> bool:
    """On the CPU, torch's allocator raises a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )
