"""Tensors on the wire: a closed list of element types, row-major little-endian bytes, every shape checked.

Knows no framework: a tensor is `RawTensor`, bytes with a type and a shape; `darkroom/models/tensors.py` knows torch.
"""

import hashlib
import math
import re
from dataclasses import dataclass

from darkroom.errors import InvalidTensor
from darkroom.v1 import tensor_pb2

INLINE_LIMIT_BYTES = 1 << 20
"""Tensors up to this size travel by value, larger ones by ref."""
CHUNK_BYTES = 1 << 20
MAX_TENSOR_BYTES = 1 << 30
MAX_DIMS = 8
MAX_EXTENT = (1 << 31) - 1

_WIDTHS = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "uint8": 1}
_TO_PROTO = {name: f"ELEMENT_TYPE_{name.upper()}" for name in _WIDTHS}
_FROM_PROTO = {tensor_pb2.ElementType.Value(value): name for name, value in _TO_PROTO.items()}
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class RawTensor:
    """A tensor's bytes with their meaning; `element_type` is one of float32, float16, bfloat16, int64, int32, uint8."""

    element_type: str
    shape: tuple[int, ...]
    data: bytes


@dataclass(frozen=True, slots=True)
class RemoteTensor:
    """A tensor whose bytes a replica holds."""

    element_type: str
    shape: tuple[int, ...]
    digest: str
    holder_address: str
    expire_time_s: float
    """When the holder may drop it, in seconds since the epoch."""

    @property
    def size_bytes(self) -> int:
        """Bytes that fetching it moves."""
        return math.prod(self.shape) * _WIDTHS[self.element_type]


def digest_of(data: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def parse_tensor(name: str, message: tensor_pb2.Tensor) -> RawTensor | RemoteTensor:
    """Checks a received tensor. Raises InvalidTensor naming it."""
    element_type = _FROM_PROTO.get(message.element_type)
    if element_type is None:
        raise InvalidTensor(name, f"has an unknown element type, {message.element_type}")
    shape = _checked_shape(name, tuple(message.shape), _WIDTHS[element_type])
    match message.WhichOneof("content"):
        case "data":
            return check_size(name, RawTensor(element_type, shape, message.data))
        case "ref":
            if not _DIGEST.fullmatch(message.ref.digest):
                raise InvalidTensor(name, "has a ref whose digest is not 64 hexadecimal digits")
            return RemoteTensor(
                element_type, shape, message.ref.digest, message.ref.holder_address, _expire_time_s(name, message.ref)
            )
        case _:
            raise InvalidTensor(name, "has neither data nor ref")


def _expire_time_s(name: str, ref: tensor_pb2.TensorRef) -> float:
    try:
        return ref.expire_time.ToMilliseconds() / 1000
    except ValueError as error:
        raise InvalidTensor(name, "has a ref whose expire_time is no timestamp") from error


def _checked_shape(name: str, shape: tuple[int, ...], width: int) -> tuple[int, ...]:
    if len(shape) > MAX_DIMS:
        raise InvalidTensor(name, f"has {len(shape)} dimensions; at most {MAX_DIMS} are allowed")
    if any(extent < 1 or extent > MAX_EXTENT for extent in shape):
        raise InvalidTensor(name, f"has an extent outside 1 to {MAX_EXTENT}")
    if math.prod(shape) * width > MAX_TENSOR_BYTES:
        raise InvalidTensor(name, f"is larger than {MAX_TENSOR_BYTES} bytes")
    return shape


def check_size(name: str, tensor: RawTensor) -> RawTensor:
    """The tensor itself, if its bytes are as many as its shape says. Raises InvalidTensor."""
    expected = math.prod(tensor.shape) * _WIDTHS[tensor.element_type]
    if len(tensor.data) != expected:
        raise InvalidTensor(name, f"has {len(tensor.data)} bytes where its shape and type ask for {expected}")
    return tensor


def value_message(tensor: RawTensor) -> tensor_pb2.Tensor:
    """The tensor by value."""
    return tensor_pb2.Tensor(element_type=_TO_PROTO[tensor.element_type], shape=tensor.shape, data=tensor.data)


def ref_message(tensor: RemoteTensor) -> tensor_pb2.Tensor:
    """The tensor by ref."""
    message = tensor_pb2.Tensor(element_type=_TO_PROTO[tensor.element_type], shape=tensor.shape)
    message.ref.digest, message.ref.holder_address = tensor.digest, tensor.holder_address
    message.ref.expire_time.FromMilliseconds(round(tensor.expire_time_s * 1000))
    return message


def tensor_message(tensor: RawTensor | RemoteTensor) -> tensor_pb2.Tensor:
    """The tensor as it is: by value or by ref."""
    return value_message(tensor) if isinstance(tensor, RawTensor) else ref_message(tensor)
