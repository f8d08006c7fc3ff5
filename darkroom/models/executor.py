"""Runs programs, each in a greenlet, on one thread, and batches the network forwards they wait on.

Rules kept: greenlets live and die on the engine's thread; that thread is in inference mode for good, because grad mode
belongs to the thread and not to the greenlet; nobody but that thread touches the queue and the programs. Others reach
it by a thread-safe queue. Which forwards run together, and which requests hold a slot, is decided by `policy`; here it
is done.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import structlog
import torch

from darkroom.errors import DarkroomError, DeadlinePassed
from darkroom.models.batches import BatchRunner
from darkroom.models.forwards import Forward
from darkroom.models.program import (
    Errand,
    Program,
    ProgramCancelled,
    ProgramEnded,
    ProgramPushedOut,
    Ticket,
    fail,
)
from darkroom.policy.cost import CostCurve
from darkroom.policy.fairness import ServedTime
from darkroom.policy.fusion import GUESSED_RATIO
from darkroom.policy.slots import SlotRequest, choose_slots
from darkroom.policy.stepbatch import WaitingForward, choose_batch

T = TypeVar("T")
_log = structlog.get_logger()
_STOP, _WAKE = object(), object()
_LONGEST_SLEEP_S = 3600.0
_MEAN_WEIGHT = 0.05
_SLOTS_INTERVAL_S = 0.05
"""While all slots are taken, how often it is looked whether somebody has to be pushed out."""


@dataclass(slots=True)
class EngineCounts:
    """What the engine has run since its start."""

    batches: int = 0
    forwards: int = 0


@dataclass(frozen=True, slots=True)
class _Returned:
    """An errand is done."""

    program: Program
    errand: Errand


class Executor:
    """One engine thread. `submit` may be called from any thread."""

    def __init__(
        self,
        *,
        max_batch_rows: int,
        slot_count: int = 64,
        thread_count: int | None = None,
        stage: str = "denoiser",
        probes: bool = False,
    ) -> None:
        """`slot_count`: programs resident at once; `thread_count`: torch threads, None for its own.

        `probes`: whether idle moments are used to measure what batches of other sizes would cost.
        """
        self._max_batch_rows, self._slot_count = max_batch_rows, slot_count
        self._thread_count, self._stage = thread_count, stage
        self._arrivals: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._queued: list[Program] = []
        self._resident: list[Program] = []
        self.counts = EngineCounts()
        self.costs = CostCurve()
        self._served = ServedTime()
        self._handed_back_with: DarkroomError | None = None
        self._is_dead = False
        self._mean_forward_s = 0.0
        self._slots_due_s = 0.0
        self._batches = BatchRunner(self.costs, max_probe_rows=max_batch_rows if probes else 0)
        self._thread = threading.Thread(target=self._run, name="executor", daemon=True)
        self._thread.start()

    def submit(
        self, function: Callable[[], T], *, alone: bool = False, ticket: Ticket | None = None
    ) -> tuple[Future[T], Ticket]:
        """Runs `function` as a program. Cancelling the future ends it at its next forward.

        `alone` is short for a ticket that says so. The ticket's counts are complete once the future is done.
        """
        ticket = ticket or Ticket(alone=alone)
        program = Program(function, ticket, Future(), arrived_s=time.monotonic())
        program.future.add_done_callback(lambda _: self._arrivals.put(_WAKE))
        self._arrivals.put(program)
        return program.future, ticket

    def hand_back(self, error: DarkroomError) -> None:
        """Ends every program that can go on elsewhere, and any that still arrives, with `error` at its next stop."""
        self._arrivals.put(error)

    def close(self) -> None:
        """Ends the thread; programs still there are cancelled."""
        self._arrivals.put(_STOP)
        self._thread.join()

    @property
    def queued_count(self) -> int:
        """Programs that wait for a slot."""
        return len(self._queued)

    @property
    def resident_count(self) -> int:
        """Programs that hold a slot."""
        return len(self._resident)

    def overdue_s(self, now_s: float) -> float:
        """How much longer the batch that runs now takes than was to be expected; negative while it is in time.

        Infinite once the engine is dead.
        """
        return math.inf if self._is_dead else self._batches.overdue_s(now_s)

    def _run(self) -> None:
        if self._thread_count is not None:
            torch.set_num_threads(self._thread_count)
        try:
            with torch.inference_mode():
                while self._take_arrivals():
                    self._turn(time.monotonic())
        except BaseException:
            self._is_dead = True  # whoever watches gives the requests up
            _log.exception("engine_died")
            raise
        for program in (*self._resident, *self._queued):
            program.future.cancel()
            program.end(ProgramCancelled())

    def _turn(self, now_s: float) -> None:
        self._end_unwanted(now_s)
        self._fill_slots(now_s)
        self._run_next_batch(now_s)
        if self._batches.has_probes and not self._is_busy:
            self._batches.probe()

    def _take_arrivals(self) -> bool:
        """Takes in what has arrived; waits for it when there is nothing else to do. False once stopped."""
        patience_s = self._idle_s()
        while True:
            try:
                arrived = self._arrivals.get(timeout=patience_s)
            except queue.Empty:
                return True
            patience_s = 0.0  # only the first is worth waiting for
            if arrived is _STOP:
                return False
            if isinstance(arrived, Program):
                self._queued.append(arrived)
            elif isinstance(arrived, _Returned):
                self._return(arrived)
            elif isinstance(arrived, DarkroomError):
                self._handed_back_with = arrived

    def _idle_s(self) -> float:
        """How long to wait for an arrival: not at all while a forward waits or a slot can be filled."""
        if self._is_busy or self._batches.has_probes:
            return 0.0
        deadline_s = min((p.ticket.deadline_s for p in (*self._resident, *self._queued)), default=math.inf)
        return max(0.0, min(deadline_s - time.monotonic(), _LONGEST_SLEEP_S))

    @property
    def _is_busy(self) -> bool:
        can_start = bool(self._queued) and len(self._resident) < self._slot_count
        return can_start or any(program.forward for program in self._resident)

    def _return(self, returned: _Returned) -> None:
        program, future = returned.program, returned.errand.future
        if program.errand is not returned.errand:
            return  # it was ended or pushed out meanwhile
        error = ProgramCancelled() if future.cancelled() else future.exception()
        self._took(program, program.resume(future.result() if error is None else error))

    def _end_unwanted(self, now_s: float) -> None:
        for program in (*self._resident, *self._queued):
            if program.future.cancelled():
                self._forget(program, ProgramCancelled())
            elif program.ticket.deadline_s <= now_s:
                self._end(program, DeadlinePassed(self._stage))
            elif self._handed_back_with is not None and program.ticket.movable:
                self._end(program, self._handed_back_with)

    def _end(self, program: Program, error: DarkroomError) -> None:
        self._forget(program, ProgramEnded(error))
        fail(program.future, error)  # one that had not started yet

    def _forget(self, program: Program, reason: BaseException) -> None:
        (self._resident if program in self._resident else self._queued).remove(program)
        program.end(reason)

    def _fill_slots(self, now_s: float) -> None:
        if not self._queued:
            return
        if len(self._resident) + len(self._queued) <= self._slot_count:
            starting = self._queued
            self._queued = []
        elif len(self._resident) < self._slot_count or now_s >= self._slots_due_s:
            starting = self._make_room(now_s)
            self._slots_due_s = now_s + _SLOTS_INTERVAL_S
        else:
            return
        for program in starting:
            self._resident.append(program)
            self._took(program, program.start())

    def _make_room(self, now_s: float) -> list[Program]:
        """Pushes out whom `choose_slots` says. Returns the programs to start."""
        chosen = choose_slots(
            [self._slot_request(program) for program in self._queued],
            [self._slot_request(program) for program in self._resident],
            slot_count=self._slot_count,
            now_s=now_s,
        )
        starting = [self._queued[position] for position in chosen.start]
        pushed_out = [self._resident[position] for position in chosen.push_out]
        for program in starting:
            self._queued.remove(program)
        for program in pushed_out:
            self._forget(program, ProgramPushedOut())
            program.ticket.pushed_out += 1
            self._queued.append(program)
        return starting

    def _run_next_batch(self, now_s: float) -> None:
        waiting = [program for program in self._resident if program.forward is not None]
        if not waiting:
            return
        cost_keys = {forward.key: forward.cost_key for forward in map(_forward_of, waiting)}
        chosen = choose_batch(
            [_place_in_line(program) for program in waiting],
            now_s=now_s,
            max_rows=self._max_batch_rows,
            cost=lambda key, rows: self.costs.seconds(cost_keys[key], rows),
            served_s=self._served.read(now_s),
            row_limits=self._batches.row_limits(now_s),
        )
        batch = [waiting[position] for position in chosen.positions]
        for outcome in self._batches.run([_forward_of(program) for program in batch]):
            programs = [batch[position] for position in outcome.positions]
            self._count(programs, outcome.seconds)
            for program, answer in zip(programs, outcome.answers, strict=True):
                self._took(program, program.resume(answer))

    def _count(self, programs: list[Program], seconds: float) -> None:
        self.counts.batches += 1
        self.counts.forwards += len(programs)
        self._mean_forward_s += _MEAN_WEIGHT * (seconds - self._mean_forward_s)
        rows = sum(_forward_of(program).rows for program in programs)
        for program in programs:
            ticket = program.ticket
            ticket.forwards += 1
            ticket.batched += len(programs) > 1
            self._served.add(ticket.tenant, seconds * _forward_of(program).rows / rows, time.monotonic())
        if any(_forward_of(program).adapter for program in programs):
            self._count_adapted(programs, rows)

    def _count_adapted(self, programs: list[Program], rows: int) -> None:
        """Notes what forwards with LoRAs cost, and what they would cost without."""
        usual_s = self._batches.usual_s([_forward_of(program) for program in programs])
        for program in programs:
            forward, ticket = _forward_of(program), program.ticket
            if forward.adapter is not None and usual_s is not None:
                share_s = usual_s * forward.rows / rows
                ticket.adapted_s += share_s
                ticket.bare_s += self._batches.bare_s(forward) or share_s / GUESSED_RATIO

    def _took(self, program: Program, said: Any) -> None:
        """Notes what a program stopped with."""
        assert program.greenlet is not None
        if program.greenlet.dead:
            self._resident.remove(program)
            program.greenlet = None
        elif isinstance(said, Errand):
            program.errand = said
            said.future.add_done_callback(lambda _: self._arrivals.put(_Returned(program, said)))
        else:
            program.wait(said, time.monotonic())

    def _slot_request(self, program: Program) -> SlotRequest:
        ticket = program.ticket
        return SlotRequest(
            request_id=ticket.request_id,
            deadline_s=ticket.deadline_s,
            remaining_s=self._remaining_s(program),
            priority=ticket.priority,
            tenant=ticket.tenant,
            waiting_since_s=program.arrived_s,
            is_restartable=ticket.restartable,
            pushed_out_count=ticket.pushed_out,
        )

    def _remaining_s(self, program: Program) -> float:
        """Seconds a program still needs by itself; one that never ran is taken for an average one."""
        if program.forward is not None:
            program.forward_s = self.costs.seconds(program.forward.cost_key, program.forward.rows)
        return program.ticket.forwards_left * (program.forward_s or self._mean_forward_s)


def _forward_of(program: Program) -> Forward:
    assert program.forward is not None
    return program.forward


def _place_in_line(program: Program) -> WaitingForward:
    assert program.place_in_line is not None
    return program.place_in_line
