"""RawTensor to torch and back."""

import torch

from darkroom.errors import InvalidTensor
from darkroom.wire.tensors import RawTensor

_TYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "int32": torch.int32,
    "uint8": torch.uint8,
}
_NAMES = {dtype: name for name, dtype in _TYPES.items()}


def to_torch(tensor: RawTensor) -> torch.Tensor:
    """The tensor on the CPU; owns its memory."""
    return torch.frombuffer(bytearray(tensor.data), dtype=_TYPES[tensor.element_type]).reshape(tensor.shape)


def to_raw(tensor: torch.Tensor) -> RawTensor:
    """The tensor's bytes, row-major."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return RawTensor(_NAMES[tensor.dtype], tuple(tensor.shape), flat.view(torch.uint8).numpy().tobytes())


def check_finite(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself. Raises InvalidTensor if it holds NaN or infinity, or no real numbers at all."""
    if not tensor.is_floating_point():
        raise InvalidTensor(name, "must be of a floating point type")
    if not bool(torch.isfinite(tensor).all()):
        raise InvalidTensor(name, "holds values that are not finite")
    return tensor
