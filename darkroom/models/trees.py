"""Values that solvers keep and networks are called with, as JSON and named tensors, and back: a closed list of kinds.

None, bool, int, float, str    themselves; a float that is no number as {"float": "nan"}
tensor                         {"tensor": name, "type": "float32"}; types the wire lacks travel as their bytes,
                               with "shape"; one that was in host memory, and goes back there, has "host": true;
                               one that lay in memory in another order of dimensions, slowest first, has "order",
                               because convolutions round differently then
NumPy scalar, array            {"scalar": value, "type": "float64"}, {"array": name, "type": …}
list, tuple, dict              {"list": […]}, {"tuple": […]}, {"dict": {…}}
output of a network            {"output": {…}}; comes back as something that is read in the same ways
distribution of latents        {"gaussian": parameters}
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.utils.outputs import BaseOutput

_MAX_DEPTH = 16
_WIRE_TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8)
_OTHER_TYPES = {str(t).removeprefix("torch."): t for t in (torch.float64, torch.int16, torch.int8, torch.bool)}


class Unstorable(Exception):
    """A value of a kind that no tree holds."""


class Unreadable(Exception):
    """JSON that is no tree. The message goes on after "it"."""


def to_tree(value: Any, tensors: dict[str, torch.Tensor]) -> Any:  # noqa: C901, PLR0911 - one return for each kind
    """The value as JSON; copies of its tensors, on the CPU, are added to `tensors`. Raises Unstorable."""
    match value:
        case None | bool() | str():
            return value
        case np.generic():
            return {"scalar": value.item(), "type": str(value.dtype)}
        case int():
            return value
        case float():
            return value if math.isfinite(value) else {"float": repr(value)}
        case torch.Tensor():
            return _tensor_tree("tensor", value, tensors)
        case np.ndarray():
            try:
                return _tensor_tree("array", torch.from_numpy(value), tensors)
            except TypeError as error:
                raise Unstorable(f"an array of {value.dtype}") from error
        case DiagonalGaussianDistribution():
            return {"gaussian": to_tree(value.parameters, tensors)}
        case BaseOutput():
            return {"output": {key: to_tree(item, tensors) for key, item in value.items()}}
        case list() | tuple():
            kind = "list" if isinstance(value, list) else "tuple"
            return {kind: [to_tree(item, tensors) for item in value]}
        case dict() if all(isinstance(key, str) for key in value):
            return {"dict": {key: to_tree(item, tensors) for key, item in value.items()}}
    raise Unstorable(type(value).__name__)


def _tensor_tree(kind: str, value: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    name = f"t{len(tensors)}"
    tree = {kind: name, "type": str(value.dtype).removeprefix("torch."), "host": value.device.type == "cpu"}
    order = _order(value)
    if order:
        tree["order"] = order
    copied = value.detach().to("cpu", copy=True).contiguous()
    if value.dtype in _WIRE_TYPES:
        tensors[name] = copied
        return tree
    if tree["type"] not in _OTHER_TYPES:
        raise Unstorable(f"a tensor of {tree['type']}")
    tensors[name] = copied.reshape(-1).view(torch.uint8)
    return {**tree, "shape": list(value.shape)}


def _order(value: torch.Tensor) -> list[int] | None:
    """The dimensions as they lie in memory, slowest first; None for row-major, and for tensors with gaps."""
    if value.is_contiguous():
        return None
    order = sorted(range(value.ndim), key=value.stride, reverse=True)
    return order if value.permute(order).is_contiguous() else None


def _ordered(tensor: torch.Tensor, order: Any) -> torch.Tensor:
    """The tensor, its dimensions in that order in memory."""
    if order is None:
        return tensor
    if not isinstance(order, list) or sorted(map(str, order)) != sorted(map(str, range(tensor.ndim))):
        raise Unreadable("holds a tensor in no order of its dimensions")
    back = [order.index(dimension) for dimension in range(tensor.ndim)]
    return tensor.permute(order).contiguous().permute(back)


def from_tree(  # noqa: C901, PLR0911 - one case for each kind
    tree: Any, tensors: Mapping[str, torch.Tensor], device: torch.device, depth: int = 0
) -> Any:
    """The value, its tensors on `device`. Raises Unreadable for what `to_tree` never made."""
    if depth > _MAX_DEPTH:
        raise Unreadable("is nested too deep")
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    if not isinstance(tree, dict):
        raise Unreadable("holds a list where a value should be")
    match tree:
        case {"float": str(text)} if text in ("nan", "inf", "-inf"):
            return float(text)
        case {"scalar": bool() | int() | float() as value, "type": str(type_name)}:
            return _numpy_type(type_name)(value)
        case {"tensor": str(name), "type": str(type_name)}:
            home = torch.device("cpu") if tree.get("host") is True else device
            return _ordered(_tensor(tree, name, type_name, tensors), tree.get("order")).to(home, copy=True)
        case {"array": str(name), "type": str(type_name)}:
            return _tensor(tree, name, type_name, tensors).numpy().copy()
        case {"list": list(items)}:
            return [from_tree(item, tensors, device, depth + 1) for item in items]
        case {"tuple": list(items)}:
            return tuple(from_tree(item, tensors, device, depth + 1) for item in items)
        case {"gaussian": dict(parameters)}:
            return DiagonalGaussianDistribution(from_tree(parameters, tensors, device, depth + 1))
        case {"output": dict(items)}:
            return Output({key: from_tree(item, tensors, device, depth + 1) for key, item in items.items()})
        case {"dict": dict(items)}:
            return {key: from_tree(item, tensors, device, depth + 1) for key, item in items.items()}
    raise Unreadable("holds a value of an unknown kind")


def _tensor(tree: dict[str, Any], name: str, type_name: str, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    tensor = tensors.get(name)
    if tensor is None:
        raise Unreadable(f"names tensor {name[:16]!r}, which is not there")
    if str(tensor.dtype) == f"torch.{type_name}":
        return tensor
    try:
        return tensor.view(_OTHER_TYPES[type_name]).reshape(tree["shape"])
    except (KeyError, RuntimeError, TypeError) as error:
        raise Unreadable(f"has tensor {name[:16]!r} in another type than it says") from error


def _numpy_type(name: str) -> Any:
    kind = getattr(np, name, None)
    if not (isinstance(kind, type) and issubclass(kind, np.number | np.bool_)):
        raise Unreadable(f"holds a number of type {name[:16]!r}")
    return kind


def shape_of(answer: Any) -> Any:
    """What a network answered, as JSON without the numbers: what `blank` makes zeros of. Raises Unstorable."""
    match answer:
        case torch.Tensor():
            return {"zeros": list(answer.shape), "type": str(answer.dtype).removeprefix("torch.")}
        case list() | tuple():
            return {"list" if isinstance(answer, list) else "tuple": [shape_of(item) for item in answer]}
        case dict():
            return {"output": {key: shape_of(item) for key, item in answer.items()}}
        case None:
            return None
    raise Unstorable(type(answer).__name__)


def blank(shape: Any, device: torch.device) -> Any:
    """Zeros in the shape that `shape_of` noted. Raises Unreadable."""
    match shape:
        case None:
            return None
        case {"zeros": list(extents), "type": str(type_name)}:
            dtype = getattr(torch, type_name, None)
            if not isinstance(dtype, torch.dtype) or not all(isinstance(e, int) and 0 <= e < 1 << 24 for e in extents):
                raise Unreadable("describes a network's answer that cannot be")
            return torch.zeros((), dtype=dtype, device=device).expand(extents)
        case {"list": list(items)}:
            return [blank(item, device) for item in items]
        case {"tuple": list(items)}:
            return tuple(blank(item, device) for item in items)
        case {"output": dict(items)}:
            return Output({key: blank(item, device) for key, item in items.items()})
    raise Unreadable("describes a network's answer that cannot be")


class Output(dict[str, Any]):
    """Read like the output classes of diffusers: by name, as an attribute, or by position."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __getitem__(self, key: str | int) -> Any:
        """The item by name, or by position."""
        return list(self.values())[key] if isinstance(key, int) else super().__getitem__(key)
