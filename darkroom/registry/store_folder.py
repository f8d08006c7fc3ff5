"""Reads one folder of a model store as data from strangers: nothing in it can crash, block or lead out of the store.

The rule: small JSON, and the headers of LoRA files, are all that is ever read; of everything else only names and sizes
count.
"""

import json
import math
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, BinaryIO

_MAX_JSON_BYTES = 1 << 20
_MAX_FILES = 10_000
_MAX_HEADER_BYTES = 16 << 20
_MAX_TENSORS = 50_000
_MAX_TENSOR_DIMS = 8
_LENGTH_BYTES = 8
_FLOAT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_PICKLED_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl"})


class Refused(Exception):
    """The folder is no model that can be served. The message says why."""


@dataclass(frozen=True, slots=True)
class TensorFile:
    """A safetensors file, by its header."""

    tensor_names: tuple[str, ...]
    size_bytes: int


class StoreFolder:
    """One model's or LoRA's folder."""

    def __init__(self, root: Path, path: Path) -> None:
        """Raises Refused if the folder lies elsewhere in truth."""
        self._root = os.path.realpath(root)
        self._path = self._inside(path)

    def read_object(self, relative: str) -> dict[str, object]:
        """A JSON file's object. Raises Refused."""
        found = self.find_object(relative)
        if found is None:
            raise Refused(f"{relative} is missing")
        return found

    def find_object(self, relative: str) -> dict[str, object] | None:
        """A JSON file's object, or None if there is no such file. Raises Refused."""
        try:
            found = json.loads(self._read(relative), parse_constant=_refuse_constant)
        except FileNotFoundError:
            return None
        except (ValueError, RecursionError) as error:
            raise Refused(f"{relative} is not JSON: {str(error)[:200]}") from error
        except OSError as error:
            raise Refused(f"{relative} cannot be read: {error.strerror}") from error
        if not isinstance(found, dict):
            raise Refused(f"{relative} is not a JSON object")
        return found

    def component_bytes(self, name: str) -> int:
        """The sizes of all files of a component together. Raises Refused if its weights are not in safetensors."""
        total, suffixes = 0, set()
        try:
            for path, size_bytes in self._files(name):
                total += size_bytes
                suffixes.add(PurePath(path).suffix.lower())
        except OSError as error:
            raise Refused(f"component {name} cannot be read: {error.strerror}") from error
        if suffixes & _PICKLED_SUFFIXES and ".safetensors" not in suffixes:
            raise Refused(
                f"component {name} has its weights in {min(suffixes & _PICKLED_SUFFIXES)}, not in safetensors"
            )
        return total

    def weights(self) -> list[str]:
        """Names of the safetensors files that lie in the folder itself, sorted. Raises OSError."""
        with os.scandir(self._path) as entries:
            return sorted(entry.name for entry in entries if entry.name.endswith(".safetensors"))

    def read_header(self, relative: str) -> TensorFile:
        """A safetensors file of floating point numbers, by its header alone. Raises Refused for what is none."""
        try:
            with self._open(relative) as file:
                size_bytes = os.fstat(file.fileno()).st_size
                header, data_bytes = _read_header(file, size_bytes)
            _check_tensors(header, data_bytes)
        except (ValueError, TypeError, KeyError, RecursionError, OverflowError) as error:
            raise Refused(f"{relative[:64]} is no safetensors file: {str(error)[:200]}") from error
        except OSError as error:
            raise Refused(f"{relative[:64]} cannot be read: {error.strerror}") from error
        return TensorFile(tuple(header), size_bytes)

    def _files(self, name: str) -> Iterator[tuple[str, int]]:
        """Path and size of each file below a component's folder, in no order."""
        folders, count = [str(self._inside(self._path / name))], 0
        while folders:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    count += 1
                    if count > _MAX_FILES:
                        raise Refused(f"component {name} has over {_MAX_FILES} files")
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
                    else:
                        yield entry.path, self._file_bytes(entry.path)

    def _file_bytes(self, path: str) -> int:
        status = self._inside(path).stat()
        if not stat.S_ISREG(status.st_mode):
            raise Refused(f"{PurePath(path).name} is no regular file")
        return status.st_size

    def _read(self, relative: str) -> bytes:
        with self._open(relative) as file:
            content = file.read(_MAX_JSON_BYTES + 1)
        if len(content) > _MAX_JSON_BYTES:
            raise Refused(f"{relative} has over {_MAX_JSON_BYTES} bytes")
        return content

    def _open(self, relative: str) -> BinaryIO:
        descriptor = os.open(self._inside(self._path / relative), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        file = os.fdopen(descriptor, "rb")
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            file.close()
            raise Refused(f"{relative} is no regular file")
        return file

    def _inside(self, path: str | Path) -> Path:
        """The real path. Raises Refused for one that leaves the store; OSError for none."""
        real = Path(os.path.realpath(path, strict=True))
        if not real.is_relative_to(self._root):
            raise Refused(f"{PurePath(path).name} is a link that leaves the store")
        return real


def _refuse_constant(name: str) -> float:
    """Infinities stand in diffusers' own scheduler configs; what is no number at all stands nowhere."""
    if name == "NaN":
        raise ValueError(f"{name} is no JSON number")
    return float(name)


def _read_header(file: BinaryIO, size_bytes: int) -> tuple[dict[str, Any], int]:
    """The entry of each tensor, and how many bytes of data follow. Raises ValueError or TypeError."""
    left_bytes = size_bytes - _LENGTH_BYTES
    length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
    if not 0 < length <= min(left_bytes, _MAX_HEADER_BYTES):
        raise ValueError(f"a header of {length} bytes in a file of {size_bytes}")
    header = json.loads(file.read(length), parse_constant=_refuse_constant)
    if not isinstance(header, dict):
        raise TypeError("its header is no object")
    header.pop("__metadata__", None)
    return header, left_bytes - length


def _check_tensors(tensors: dict[str, Any], data_bytes: int) -> None:
    """Raises ValueError, TypeError or KeyError unless types, shapes and places agree and fill the file."""
    if not 1 <= len(tensors) <= _MAX_TENSORS:
        raise ValueError(f"{len(tensors)} tensors, not 1 to {_MAX_TENSORS}")
    places = []
    for name, entry in tensors.items():
        start, end = entry["data_offsets"]
        shape, width = entry["shape"], _FLOAT_BYTES.get(entry["dtype"])
        is_whole = all(type(number) is int and number >= 0 for number in (start, end, *shape))
        if not is_whole or len(shape) > _MAX_TENSOR_DIMS:
            raise ValueError(f"tensor {name[:64]!r} has no shape or place")
        if width is None:
            raise ValueError(f"tensor {name[:64]!r} is not of floating point numbers")
        if end - start != width * math.prod(shape):
            raise ValueError(f"tensor {name[:64]!r} is not as large as its header says")
        places.append((start, end))
    ends = [0, *(end for _, end in sorted(places))]
    if [start for start, _ in sorted(places)] != ends[:-1] or ends[-1] != data_bytes:
        raise ValueError("its tensors overlap, leave gaps, or end before or after the file")
