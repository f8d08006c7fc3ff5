"""Networks of this replica, called from others."""

import inspect
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from darkroom.errors import InvalidCall, NetworkNotHeld
from darkroom.models.remote import OutsideCall, Reply
from darkroom.models.standins import Batched
from darkroom.models.trees import from_tree, to_tree


class Held(Protocol):
    """What a replica has loaded under a model's id: part of a model, or a ControlNet."""

    @property
    def networks(self) -> Mapping[str, torch.nn.Module]:
        """Every network by name, as loaded."""

    @property
    def device(self) -> torch.device:
        """Where they are."""

    def stand_in(self, name: str) -> Any:
        """What the programs of this replica call in the network's place; None where there is no such network."""


def call_network(part: Held, call: OutsideCall) -> Reply:
    """The program that serves a call from elsewhere. Raises NetworkNotHeld or InvalidCall.

    The caller may run in another type than the network: numbers of floating point are cast to the network's, and what
    it answers to that of the first argument, as if it were there.
    """
    stand_in = part.stand_in(call.network)
    method = vars(stand_in).get(call.method) if type(stand_in) is Batched else None
    if method is None:
        raise NetworkNotHeld(f"{call.network}.{call.method}")
    try:
        arguments = from_tree(call.arguments, call.tensors, part.device)
        inspect.signature(getattr(part.networks[call.network], call.method)).bind(**arguments)
        answer = method(**_in_type(arguments, stand_in.dtype))
        tensors: dict[str, torch.Tensor] = {}
        return Reply(to_tree(_in_type(answer, _type_of(arguments)), tensors), tensors)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever reading, running or storing raised, it is the arguments that were unfit
        raise InvalidCall(call.network, f"does not take these arguments: {str(error)[:200]}") from error


def _in_type(values: Any, dtype: torch.dtype | None) -> Any:
    return tree_map_only(torch.Tensor, lambda t: t.to(dtype) if dtype and t.is_floating_point() else t, values)


def _type_of(arguments: Any) -> torch.dtype | None:
    tensors = (leaf for leaf in tree_leaves(arguments) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point())
    return next((tensor.dtype for tensor in tensors), None)
