"""Networks of other replicas, called from here.

A pipeline that calls a network of another stage, such as the VAE in image to image, finds a `Remote` in its place: the
call leaves the program as an errand, and others go on meanwhile.
"""

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from darkroom.errors import InvalidCall
from darkroom.models.program import Ticket, wait_elsewhere
from darkroom.models.standins import StandIn
from darkroom.models.trees import Unreadable, Unstorable, from_tree, to_tree
from darkroom.wire.calls import METHODS


@dataclass(frozen=True, slots=True)
class OutsideCall:
    """A call for another replica: what of, and the arguments as JSON that names tensors."""

    model_id: str
    network: str
    method: str
    arguments: Any
    tensors: Mapping[str, torch.Tensor]
    request_id: str = ""
    alone: bool = False
    """Never in a batch with other calls."""
    deadline_s: float = math.inf
    """On the clock of `time.monotonic`."""


@dataclass(frozen=True, slots=True)
class Home:
    """Where a network is held."""

    stage: str
    model_id: str
    network: str
    """The pipeline's name for it."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back, in the same notation."""

    answer: Any
    tensors: Mapping[str, torch.Tensor]


Send = Callable[[str, OutsideCall], "Future[Reply]"]
"""Calls a network at a replica of the stage named."""

_ticket: ContextVar[Ticket | None] = ContextVar("ticket", default=None)


@contextlib.contextmanager
def calling_for(ticket: Ticket) -> Iterator[None]:
    """Calls made inside, by this program, are made for this request: alone if it is, and no longer than it has."""
    token = _ticket.set(ticket)
    try:
        yield
    finally:
        _ticket.reset(token)


class Remote(StandIn):
    """Stands for a network that another stage holds, and calls it there."""

    def __init__(
        self, network: torch.nn.Module, home: Home, send: Send, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        """`network` lives on the meta device: it answers for config and class."""
        super().__init__(network)
        first = torch.nn.Parameter(torch.empty(0, device=device, dtype=dtype), requires_grad=False)
        # pipelines that want its type or device look at its first parameter
        self.__dict__.update(device=device, dtype=dtype, parameters=lambda **_: iter((first,)))
        for method in METHODS:
            if hasattr(network, method):
                signature = inspect.signature(getattr(network, method))
                self.__dict__[method] = partial(_call, signature, home, method, send, device)


def _call(
    signature: inspect.Signature,
    home: Home,
    method: str,
    send: Send,
    device: torch.device,
    /,
    *args: Any,
    **kwargs: Any,
) -> Any:
    ticket = _ticket.get() or Ticket()
    tensors: dict[str, torch.Tensor] = {}
    given = dict(signature.bind(*args, **kwargs).arguments)
    given.pop("generator", None)  # some VAEs take one, and do not use it
    try:
        arguments = to_tree(given, tensors)
    except Unstorable as error:
        raise InvalidCall(home.network, f"cannot be called elsewhere with {error}") from error
    call = OutsideCall(
        home.model_id,
        home.network,
        method,
        arguments,
        tensors,
        request_id=ticket.request_id,
        alone=ticket.alone,
        deadline_s=ticket.deadline_s,
    )
    reply = _wait(lambda: send(home.stage, call))
    try:
        return from_tree(reply.answer, reply.tensors, device)
    except Unreadable as error:
        raise InvalidCall(home.network, f"answered what {error}") from error


def _wait(start: Callable[[], "Future[Reply]"]) -> Reply:
    """Leaves the program until the reply is there. A program that is ended meanwhile takes its call along."""
    started: list[Future[Reply]] = []

    def noted() -> "Future[Reply]":
        started.append(start())
        return started[0]

    try:
        reply: Reply = wait_elsewhere(noted)
    except BaseException:
        for future in started:
            future.cancel()
        raise
    return reply
