"""Writes the index of a folder of models, so that a server without listings can serve it as a model store.

The rule: readers see the old index or the new one, whole; the index is replaced last.
"""

import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import blake3

from darkroom.store.header import Malformed, read_header
from darkroom.store.manifest import (
    FOLDER,
    INDEX_PATH,
    MAX_DEPTH,
    Digest,
    FileEntry,
    Index,
    Manifest,
    is_counted,
    is_entry_id,
    is_weights,
    manifest_path,
)

_HASH_BLOCK_BYTES = 8 << 20


def write_index(root: Path, *, on_entry: Callable[[str, Manifest], None] = lambda _id, _manifest: None) -> Index:
    """Reads every file of the store at `root`, and writes manifests and index. Raises OSError, or Malformed.

    `on_entry` hears of each entry. Malformed names a weights file that is no safetensors, and nothing is written then.
    """
    root = root.resolve(strict=True)
    manifests: dict[str, Manifest] = {}
    for folder in sorted(path for path in root.iterdir() if path.is_dir() and is_entry_id(path.name)):
        files = {path: _read_file(file, path) for path, file in _files(root, folder)}
        if files:
            manifests[folder.name] = Manifest(files)
            on_entry(folder.name, manifests[folder.name])
    entries: dict[str, Digest] = {}
    (root / FOLDER / "manifests").mkdir(parents=True, exist_ok=True)
    for entry_id, manifest in manifests.items():
        text = manifest.to_json()
        entries[entry_id] = Digest(blake3.blake3(text).hexdigest())
        write_atomically(root / manifest_path(entries[entry_id]), text)
    index = Index(entries)
    write_atomically(root / INDEX_PATH, index.to_json())
    return index


def _files(root: Path, folder: Path) -> Iterator[tuple[str, Path]]:
    """Path in the entry, and the file, of all that counts. Links count as what they lead to, inside the store."""
    for base, folders, names in os.walk(folder, followlinks=True):
        if not Path(base).resolve().is_relative_to(root):
            folders.clear()
            continue
        for name in sorted(names):
            file = Path(base, name)
            path = file.relative_to(folder).as_posix()
            if is_counted(path) and file.is_file() and file.resolve().is_relative_to(root):
                yield path, file
        if len(Path(base).relative_to(folder).parts) >= MAX_DEPTH - 1:
            folders.clear()  # links may lead in circles


def file_digest(path: Path) -> Digest:
    """The digest of a file, however large. Raises OSError."""
    with path.open("rb") as opened:
        return _digest_of_rest(opened)


def _digest_of_rest(opened: BinaryIO) -> Digest:
    hasher = blake3.blake3()
    while block := opened.read(_HASH_BLOCK_BYTES):
        hasher.update(block)
    return Digest(hasher.hexdigest())


def _read_file(file: Path, path: str) -> FileEntry:
    with file.open("rb") as opened:
        size_bytes = os.fstat(opened.fileno()).st_size
        if is_weights(path):
            try:
                read_header(opened, size_bytes)
            except Malformed as error:
                raise Malformed(f"{file} is no safetensors file: {error}") from error
            opened.seek(0)
        return FileEntry(size_bytes, _digest_of_rest(opened))


def write_atomically(path: Path, content: bytes) -> None:
    """The file has its old content or the new, whatever happens meanwhile."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")  # others may write the same
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
