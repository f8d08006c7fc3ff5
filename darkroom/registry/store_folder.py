"""Reads one folder of a model store as data from strangers: nothing in it can crash, block or lead out of the store.

The rule: small JSON, and the headers of LoRA files, are all that is ever read; of everything else only names and sizes
count.
"""

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import BinaryIO

from darkroom.store.header import Malformed, TensorFile, read_header

_MAX_JSON_BYTES = 1 << 20
_MAX_FILES = 10_000
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_PICKLED_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl"})


class Refused(Exception):
    """The folder is no model that can be served. The message says why."""


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
                header = read_header(file, os.fstat(file.fileno()).st_size)
        except Malformed as error:
            raise Refused(f"{relative[:64]} is no safetensors file: {str(error)[:200]}") from error
        except OSError as error:
            raise Refused(f"{relative[:64]} cannot be read: {error.strerror}") from error
        for name, place in header.tensors.items():
            if place.element_type not in _FLOATS:
                raise Refused(f"{relative[:64]}: tensor {name[:64]!r} is not of floating point numbers")
        return header

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
