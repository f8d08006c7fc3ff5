"""Runs programs, each in a greenlet, on one thread, and batches the network forwards they wait on.

A program is ordinary code that calls networks. Where it calls one that is `Batched`, it leaves its greenlet with a
`Forward` and comes back with the answer. Rules kept: greenlets live and die on the engine's thread; that thread is in
inference mode for good, because grad mode belongs to the thread and not to the greenlet; nobody but that thread
touches the waiting list. Others reach it by a thread-safe queue.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import greenlet
import torch

from darkroom.models.forwards import Forward, run_batch
from darkroom.policy.stepbatch import WaitingForward, choose_batch

T = TypeVar("T")
_STOP = object()


class ProgramCancelled(BaseException):
    """Thrown into a program that nobody waits for any more; not an Exception, so that pipelines do not catch it."""


@dataclass(slots=True)
class ForwardCounts:
    """What a program's forwards came to; complete once its future is done."""

    forwards: int = 0
    batched: int = 0
    """Of those, how many shared a batch with another program's."""


@dataclass(slots=True)
class EngineCounts:
    """What the engine has run since its start."""

    batches: int = 0
    forwards: int = 0


@dataclass(slots=True, eq=False)
class _Program:
    function: Callable[[], Any]
    alone: bool
    future: Future[Any]
    counts: ForwardCounts
    greenlet: greenlet.greenlet | None = field(default=None)
    waiting: Forward | None = field(default=None)

    def describe(self) -> WaitingForward:
        assert self.waiting is not None
        return WaitingForward(key=self.waiting.key, rows=self.waiting.rows, alone=self.alone)


def wait_for(forward: Forward) -> Any:
    """Called inside a program: leaves it until the forward's answer is there."""
    hub = greenlet.getcurrent().parent
    if hub is None:
        raise RuntimeError("a batched network was called outside the executor")
    return hub.switch(forward)


class Executor:
    """One engine thread. `submit` may be called from any thread."""

    def __init__(self, *, max_batch_rows: int, thread_count: int | None = None) -> None:
        """`max_batch_rows`: rows of the largest batch; `thread_count`: torch threads, None for its own."""
        self._max_batch_rows = max_batch_rows
        self._thread_count = thread_count
        self._arrivals: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._waiting: list[_Program] = []
        self.counts = EngineCounts()
        self._thread = threading.Thread(target=self._run, name="executor", daemon=True)
        self._thread.start()

    def submit(self, function: Callable[[], T], *, alone: bool = False) -> tuple[Future[T], ForwardCounts]:
        """Runs `function` as a program. Cancelling the future ends it at its next forward.

        `alone`: its forwards run by themselves, exactly as called, so the result equals plain diffusers' bit for bit.
        """
        program = _Program(function, alone, Future(), ForwardCounts())
        self._arrivals.put(program)
        return program.future, program.counts

    def close(self) -> None:
        """Ends the thread; programs still waiting are cancelled."""
        self._arrivals.put(_STOP)
        self._thread.join()

    def _run(self) -> None:
        if self._thread_count is not None:
            torch.set_num_threads(self._thread_count)
        with torch.inference_mode():
            while self._admit():
                self._drop_cancelled()
                if self._waiting:
                    self._run_next_batch()
        for program in self._waiting:
            self._cancel(program)

    def _admit(self) -> bool:
        """Starts what has arrived; waits for an arrival when there is nothing else to do. False once stopped."""
        while True:
            try:
                arrived = self._arrivals.get(block=not self._waiting)
            except queue.Empty:
                return True
            if arrived is _STOP:
                return False
            if not arrived.future.cancelled():
                arrived.greenlet = greenlet.greenlet(_guarded)
                self._switch(arrived, arrived)

    def _drop_cancelled(self) -> None:
        for program in [program for program in self._waiting if program.future.cancelled()]:
            self._waiting.remove(program)
            self._cancel(program)

    def _cancel(self, program: _Program) -> None:
        assert program.greenlet is not None
        program.future.cancel()
        program.greenlet.throw(ProgramCancelled())

    def _run_next_batch(self) -> None:
        chosen = choose_batch([program.describe() for program in self._waiting], max_rows=self._max_batch_rows)
        batch = [self._waiting[position] for position in chosen.positions]
        taken = set(chosen.positions)
        self._waiting = [program for position, program in enumerate(self._waiting) if position not in taken]
        forwards = [program.waiting for program in batch if program.waiting is not None]
        try:
            answers = run_batch(forwards)
        except Exception as error:  # noqa: BLE001 - whatever the network raised belongs to the programs that called it
            self._run_one_by_one(batch, error)
            return
        self._count(batch)
        for program, answer in zip(batch, answers, strict=True):
            self._switch(program, answer)

    def _run_one_by_one(self, batch: list[_Program], error: Exception) -> None:
        """A failed batch, call by call, so that only the call at fault fails."""
        if len(batch) == 1:
            self._resume(batch[0], partial(_throw, error))
            return
        for program in batch:
            assert program.waiting is not None
            try:
                answer = program.waiting.run()
            except Exception as own_error:  # noqa: BLE001 - as above
                self._resume(program, partial(_throw, own_error))
                continue
            self._count([program])
            self._switch(program, answer)

    def _count(self, batch: list[_Program]) -> None:
        self.counts.batches += 1
        self.counts.forwards += len(batch)
        for program in batch:
            program.counts.forwards += 1
            program.counts.batched += len(batch) > 1

    def _switch(self, program: _Program, value: Any) -> None:
        self._resume(program, lambda hub: hub.switch(value))

    def _resume(self, program: _Program, enter: Callable[[greenlet.greenlet], Any]) -> None:
        """Lets a program run until its next forward or its end."""
        assert program.greenlet is not None
        program.waiting = None
        said = enter(program.greenlet)
        if isinstance(said, Forward):
            program.waiting = said
            self._waiting.append(program)


def _throw(error: Exception, into: greenlet.greenlet) -> Any:
    return into.throw(error)


def _guarded(program: _Program) -> None:
    """The body of a program's greenlet: nothing escapes to the engine."""
    try:
        result = program.function()
    except ProgramCancelled:
        return
    except BaseException as error:  # noqa: BLE001 - it belongs to whoever waits for the future; the engine goes on
        if program.future.set_running_or_notify_cancel():
            program.future.set_exception(error)
        return
    if program.future.set_running_or_notify_cancel():
        program.future.set_result(result)
