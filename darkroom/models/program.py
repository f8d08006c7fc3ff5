"""A program: ordinary code in a greenlet that leaves it wherever it calls a network, and what the engine knows of it.

A program leaves with a `Forward` (run this here, in a batch) or an `Errand` (wait for this, others go on meanwhile).
It is ended by an exception thrown in where it waits; none of those is an Exception, so that pipelines do not catch it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import greenlet

from darkroom.errors import DarkroomError
from darkroom.models.forwards import Forward
from darkroom.policy.stepbatch import WaitingForward


class ProgramCancelled(BaseException):
    """Nobody waits for the program any more."""


class ProgramPushedOut(BaseException):
    """Another request takes the program's slot: it keeps what it needs to go on, and is started again later."""


class ProgramEnded(BaseException):
    """The program ends with `error`, after it has kept what it needs to go on elsewhere."""

    def __init__(self, error: DarkroomError) -> None:
        super().__init__(error)
        self.error = error


@dataclass(slots=True, kw_only=True)
class Ticket:
    """What the engine weighs about a request, and counts for it. Written by the engine's thread after `submit`."""

    request_id: str = ""
    tenant: str = ""
    priority: int = 0
    deadline_s: float = math.inf
    """On the clock of `time.monotonic`."""
    alone: bool = False
    """Its forwards never share a batch and run exactly as called: the result equals plain diffusers' bit for bit."""
    restartable: bool = False
    """Whether the program, run again after `ProgramPushedOut` or elsewhere, goes on where it was."""
    movable: bool = False
    """Whether its caller can go on elsewhere from its last checkpoint."""
    forwards_left: int = 1
    """Forwards still to come, as the program knows best."""
    forwards: int = 0
    """Forwards run so far."""
    batched: int = 0
    """Of those, how many shared a batch with another program's."""
    pushed_out: int = 0
    """How often it lost its slot."""
    adapted_s: float = 0.0
    """Seconds of the device that forwards with LoRAs took: of each batch, the share of its rows."""
    bare_s: float = 0.0
    """Seconds that the same forwards take by themselves on the network's own weights."""


@dataclass(slots=True)
class Errand:
    """Something done elsewhere that a program waits for."""

    future: Future[Any]


@dataclass(slots=True, eq=False)
class Program:
    """One submitted function: waiting for a slot, or resident with a greenlet of its own."""

    function: Callable[[], Any]
    ticket: Ticket
    future: Future[Any]
    arrived_s: float
    greenlet: greenlet.greenlet | None = None
    forward: Forward | None = None
    """What it waits for, if that is a forward."""
    errand: Errand | None = None
    """What it waits for, if that is done elsewhere."""
    place_in_line: WaitingForward | None = None
    """The forward as the choice of batches sees it."""
    forward_s: float | None = None
    """Seconds that its forwards take alone, as last known."""

    def start(self) -> Any:
        """Runs it until its first stop or its end. Returns what it stopped with, None at its end."""
        self.greenlet = greenlet.greenlet(_guarded)
        return self.resume(self)

    def resume(self, answer: Any) -> Any:
        """Gives it what it waited for, or throws it in, and lets it run until its next stop or its end.

        Returns what it stopped with, None at its end.
        """
        assert self.greenlet is not None
        self.forward = self.errand = None
        return self.greenlet.throw(answer) if isinstance(answer, BaseException) else self.greenlet.switch(answer)

    def wait(self, forward: Forward, now_s: float) -> None:
        """Notes that it waits for a forward."""
        ticket, self.forward = self.ticket, forward
        self.place_in_line = WaitingForward(
            key=forward.key,
            rows=forward.rows,
            alone=ticket.alone,
            request_id=ticket.request_id,
            tenant=ticket.tenant,
            priority=ticket.priority,
            deadline_s=ticket.deadline_s,
            waiting_since_s=now_s,
            arrived_s=self.arrived_s,
            steps_left=ticket.forwards_left,
        )

    def end(self, reason: BaseException) -> None:
        """Throws `reason` in until the greenlet is gone: clean-up code may call networks, and gets no answer."""
        while self.greenlet is not None and not self.greenlet.dead:
            self.resume(reason)
        self.greenlet = None


def wait_for(forward: Forward) -> Any:
    """Called inside a program: leaves it until the forward's answer is there."""
    return _hub("a batched network").switch(forward)


def wait_elsewhere(start: Callable[[], Future[Any]]) -> Any:
    """Called inside a program: leaves it until the future that `start` returns is done. Raises what that raised."""
    hub = _hub("a network of another stage")
    return hub.switch(Errand(start()))


def _hub(what: str) -> greenlet.greenlet:
    hub = greenlet.getcurrent().parent
    if hub is None:
        raise RuntimeError(f"{what} was called outside the executor")
    return hub


def _guarded(program: Program) -> None:
    """The body of a program's greenlet: nothing escapes to the engine."""
    try:
        result = program.function()
    except (ProgramCancelled, ProgramPushedOut):
        return
    except ProgramEnded as ended:
        fail(program.future, ended.error)
    except BaseException as error:  # noqa: BLE001 - it belongs to whoever waits for the future; the engine goes on
        fail(program.future, error)
    else:
        if program.future.set_running_or_notify_cancel():
            program.future.set_result(result)


def fail(future: Future[Any], error: BaseException) -> None:
    """Gives the future its error, unless it was cancelled."""
    if not future.done() and future.set_running_or_notify_cancel():
        future.set_exception(error)
