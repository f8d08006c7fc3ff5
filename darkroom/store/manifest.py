"""What a model store says of itself: an index of entries, and of each entry a manifest of its files. Pure.

The index names manifests by their digest, and a manifest names files by theirs: whoever trusts the index can check all
the rest. Both come from strangers and are bounded here, before anything they name is fetched.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, NewType, Self

import blake3

from darkroom.errors import InvalidField
from darkroom.store.header import Malformed
from darkroom.wire.fields import check_model_id

Digest = NewType("Digest", str)
"""BLAKE3 of a file's bytes, 64 hexadecimal digits: what `b3sum` prints."""

FOLDER = ".darkroom"
INDEX_PATH = f"{FOLDER}/index.json"
MAX_JSON_BYTES = 4 << 20
"""Of an index or a manifest."""
MAX_SMALL_BYTES = 64 << 20
"""Of a file that is not weights: the largest tokenizers have 30 MB."""
_MAX_ENTRIES = 10_000
_MAX_FILES = 2_000
_MAX_FILE_BYTES = 1 << 40
_MAX_SMALL_SUM_BYTES = 512 << 20
MAX_DEPTH = 4
"""Of a file's path in its entry."""
_FORMAT = 1
_DIGEST = re.compile(r"[0-9a-f]{64}")
_SEGMENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
WEIGHTS_SUFFIX = ".safetensors"
SUFFIXES = frozenset({WEIGHTS_SUFFIX, ".json", ".txt", ".model", ".jinja"})
"""Of the files that count: weights, configs, vocabularies and chat templates. Nothing else is fetched."""


def digest_of(data: bytes | memoryview) -> Digest:
    """The digest of these bytes."""
    return Digest(blake3.blake3(data).hexdigest())


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of an entry."""

    size_bytes: int
    digest: Digest


@dataclass(frozen=True, slots=True)
class Manifest:
    """The files of one entry of the store, by their path in its folder."""

    files: Mapping[str, FileEntry] = field(default_factory=dict)

    def to_json(self) -> bytes:
        """Equal manifests give equal bytes."""
        files = {path: {"size_bytes": f.size_bytes, "digest": f.digest} for path, f in sorted(self.files.items())}
        return json.dumps({"format": _FORMAT, "files": files}, separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, text: bytes) -> Self:
        """Raises Malformed."""
        found = _read_object(text, "files", _MAX_FILES)
        files = {_check_path(path): _read_file(path, entry) for path, entry in found.items()}
        folders = {str(parent) for path in files for parent in PurePosixPath(path).parents}
        if clash := folders & files.keys():
            raise Malformed(f"{min(clash)[:64]!r} is both a file and a folder")
        if sum(f.size_bytes for path, f in files.items() if not is_weights(path)) > _MAX_SMALL_SUM_BYTES:
            raise Malformed("its configs and vocabularies are too large together")
        return cls(files)


@dataclass(frozen=True, slots=True)
class Index:
    """The digest of each entry's manifest, by the entry's id."""

    entries: Mapping[str, Digest] = field(default_factory=dict)

    def to_json(self) -> bytes:
        """Equal indexes give equal bytes."""
        entries = dict(sorted(self.entries.items()))
        return json.dumps({"format": _FORMAT, "entries": entries}, separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, text: bytes) -> Self:
        """Raises Malformed."""
        found = _read_object(text, "entries", _MAX_ENTRIES)
        for entry_id in found:
            if not is_entry_id(entry_id):
                raise Malformed(f"{entry_id[:64]!r} is no id")
        return cls({entry_id: _check_digest(digest) for entry_id, digest in found.items()})


def manifest_path(digest: Digest) -> str:
    """Where a store keeps the manifest of this digest."""
    return f"{FOLDER}/manifests/{digest}.json"


def is_entry_id(text: str) -> bool:
    """Whether it can name an entry."""
    try:
        check_model_id(text)
    except InvalidField:
        return False
    return True


def is_weights(path: str) -> bool:
    """Whether the file holds tensors; others are read whole before a model can be understood."""
    return path.endswith(WEIGHTS_SUFFIX)


def is_counted(path: str) -> bool:
    """Whether a file of this path in its folder belongs into a manifest."""
    pure = PurePosixPath(path)
    is_named = len(pure.parts) <= MAX_DEPTH and all(_SEGMENT.fullmatch(part) for part in pure.parts)
    return is_named and pure.suffix in SUFFIXES


def _check_path(path: str) -> str:
    if not is_counted(path) or str(PurePosixPath(path)) != path:
        raise Malformed(f"{path[:64]!r} is no path of a model's file")
    return path


def _read_file(path: str, entry: Any) -> FileEntry:
    match entry:
        case {"size_bytes": int(size_bytes), "digest": digest} if not isinstance(size_bytes, bool):
            pass
        case _:
            raise Malformed(f"{path[:64]!r} has no size or digest")
    if not 0 <= size_bytes <= (_MAX_FILE_BYTES if is_weights(path) else MAX_SMALL_BYTES):
        raise Malformed(f"{path[:64]!r} is too large, with {str(size_bytes)[:32]} bytes")
    return FileEntry(size_bytes, _check_digest(digest))


def _check_digest(digest: Any) -> Digest:
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise Malformed(f"{str(digest)[:64]!r} is no digest")
    return Digest(digest)


def _read_object(text: bytes, key: str, limit: int) -> dict[str, Any]:
    if len(text) > MAX_JSON_BYTES:
        raise Malformed(f"it has over {MAX_JSON_BYTES} bytes")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"it is not JSON: {str(error)[:100]}") from error
    if not isinstance(found, dict) or found.get("format") != _FORMAT:
        raise Malformed(f"it is not of format {_FORMAT}")
    entries = found.get(key)
    if not isinstance(entries, dict) or len(entries) > limit:
        raise Malformed(f"it has no {key}, or over {limit}")
    return entries
