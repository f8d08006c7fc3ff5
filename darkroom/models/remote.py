"""Networks of other replicas, called from here.

A pipeline that calls a network of another stage, such as the VAE in image to image, finds a `Remote` in its place: the
call leaves the program as an errand, and others go on meanwhile.
"""

import inspect
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch

from darkroom.errors import InvalidCall
from darkroom.models.program import wait_elsewhere
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


class Remote(StandIn):
    """Stands for a network that another stage holds, and calls it there."""

    def __init__(
        self, network: torch.nn.Module, home: Home, send: Send, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        """`network` lives on the meta device: it answers for config and class."""
        super().__init__(network)
        self.__dict__.update(device=device, dtype=dtype)
        for method in METHODS:
            if hasattr(network, method):
                signature = inspect.signature(getattr(network, method))
                self.__dict__[method] = partial(_call, signature, home, method, send, device)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:  # noqa: ARG002, FBT001, FBT002
        """There is nothing to move."""
        return self


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
    tensors: dict[str, torch.Tensor] = {}
    given = dict(signature.bind(*args, **kwargs).arguments)
    given.pop("generator", None)  # some VAEs take one, and do not use it
    try:
        arguments = to_tree(given, tensors)
    except Unstorable as error:
        raise InvalidCall(home.network, f"cannot be called elsewhere with {error}") from error
    call = OutsideCall(home.model_id, home.network, method, arguments, tensors)
    reply = wait_elsewhere(lambda: send(home.stage, call))
    try:
        return from_tree(reply.answer, reply.tensors, device)
    except Unreadable as error:
        raise InvalidCall(home.network, f"answered what {error}") from error
