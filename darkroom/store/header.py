"""Reads the header of a safetensors file as data from strangers, before anything else touches the file.

The rule: any bytes at all give a header whose tensors fill the file exactly, or `Malformed`; and reading never takes
more than `MAX_HEADER_BYTES`.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

MAX_HEADER_BYTES = 16 << 20
MAX_TENSORS = 50_000
MAX_TENSOR_DIMS = 8
LENGTH_BYTES = 8
_METADATA = "__metadata__"
_WIDTHS = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
}
"""Bytes per number, by the type's name. Types that share bytes between numbers are not supported."""


class Malformed(ValueError):
    """The bytes are not what they should be. The message says why."""


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """Where a tensor lies in its file."""

    element_type: str
    shape: tuple[int, ...]
    start: int
    """Of its first byte in the file."""
    end: int
    """Of the byte after its last."""


@dataclass(frozen=True, slots=True)
class TensorFile:
    """A safetensors file, by its header."""

    tensors: Mapping[str, TensorPlace]
    metadata: Mapping[str, str]
    size_bytes: int


class Readable(Protocol):
    """What a header is read from."""

    def read(self, size: int, /) -> bytes:
        """The next bytes: fewer only at the end."""


class Beginning:
    """The first bytes of a file that comes in blocks, to read from; they stay, for whoever wants all of it."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks, self._read_bytes = blocks, 0
        self.taken = bytearray()
        """All that was taken of the blocks."""

    def read(self, size: int, /) -> bytes:
        """Takes as many blocks as that needs."""
        end = self._read_bytes + size
        while len(self.taken) < end and (block := next(self._blocks, b"")):
            self.taken += block
        found = bytes(self.taken[self._read_bytes : end])
        self._read_bytes = min(end, len(self.taken))
        return found


def read_header(file: Readable, size_bytes: int) -> TensorFile:
    """The header of a file of this size, read from its first byte. Raises Malformed, or OSError."""
    length = int.from_bytes(file.read(LENGTH_BYTES), "little")
    left_bytes = size_bytes - LENGTH_BYTES
    if not 0 < length <= min(left_bytes, MAX_HEADER_BYTES):
        raise Malformed(f"a header of {length} bytes in a file of {size_bytes}")
    return parse_header(file.read(length), length, size_bytes)


def parse_header(text: bytes, length: int, size_bytes: int) -> TensorFile:
    """`text` as the header, of `length` bytes, of a file of `size_bytes`. Raises Malformed."""
    if len(text) != length:
        raise Malformed("the file ends inside its header")
    try:
        found = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"its header is not JSON: {str(error)[:100]}") from error
    if not isinstance(found, dict):
        raise Malformed("its header is no object")
    metadata = _read_metadata(found.pop(_METADATA, None))
    if not 1 <= len(found) <= MAX_TENSORS:
        raise Malformed(f"{len(found)} tensors, not 1 to {MAX_TENSORS}")
    data_start = LENGTH_BYTES + length
    tensors = {name: _read_place(name, entry, data_start) for name, entry in found.items()}
    _check_filling(tensors, data_start, size_bytes)
    return TensorFile(tensors, metadata, size_bytes)


def _read_metadata(found: Any) -> dict[str, str]:
    if found is None:
        return {}
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise Malformed("its metadata are no strings")
    return found


def _read_place(name: str, entry: Any, data_start: int) -> TensorPlace:
    match entry:
        case {"dtype": str(element_type), "shape": list(shape), "data_offsets": [start, end]}:
            pass
        case _:
            raise Malformed(f"tensor {name[:64]!r} has no type, shape or place")
    if not all(type(number) is int and number >= 0 for number in (start, end, *shape)) or len(shape) > MAX_TENSOR_DIMS:
        raise Malformed(f"tensor {name[:64]!r} has no shape or place")
    width = _WIDTHS.get(element_type)
    if width is None:
        raise Malformed(f"tensor {name[:64]!r} is of the unknown type {element_type[:16]!r}")
    if end - start != width * math.prod(shape):
        raise Malformed(f"tensor {name[:64]!r} is not as large as its header says")
    return TensorPlace(element_type, tuple(shape), data_start + start, data_start + end)


def _check_filling(tensors: Mapping[str, TensorPlace], data_start: int, size_bytes: int) -> None:
    places = sorted((place.start, place.end) for place in tensors.values())
    ends = [data_start, *(end for _, end in places)]
    if [start for start, _ in places] != ends[:-1] or ends[-1] != size_bytes:
        raise Malformed("its tensors overlap, leave gaps, or end before or after the file")


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name appears twice")
    return found
