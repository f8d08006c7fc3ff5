"""Networks of this replica, called from others."""

import inspect

import torch

from darkroom.errors import InvalidCall, NetworkNotHeld
from darkroom.models.loader import Part
from darkroom.models.remote import OutsideCall, Reply
from darkroom.models.standins import Batched
from darkroom.models.trees import Unreadable, from_tree, to_tree


def call_network(part: Part, call: OutsideCall) -> Reply:
    """The program that serves a call from elsewhere. Raises NetworkNotHeld or InvalidCall."""
    stand_in = getattr(part.pipeline, call.network, None)
    method = vars(stand_in).get(call.method) if isinstance(stand_in, Batched) else None
    if method is None:
        raise NetworkNotHeld(f"{call.network}.{call.method}")
    try:
        arguments = from_tree(call.arguments, call.tensors, part.device)
    except Unreadable as error:
        raise InvalidCall(call.network, f"is called with what {error}") from error
    tensors: dict[str, torch.Tensor] = {}
    try:
        inspect.signature(getattr(part.networks[call.network], call.method)).bind(**arguments)
        answer = to_tree(method(**arguments), tensors)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidCall(call.network, f"does not take these arguments: {str(error)[:200]}") from error
    return Reply(answer, tensors)
