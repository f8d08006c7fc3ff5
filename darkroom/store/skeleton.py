"""A remote store as a folder to read a catalogue from: configs whole, of all else the size.

Where a header says what a file is, the header is there too; the rest are holes, which take no room. Never loaded from.
"""

import os
import shutil
from pathlib import Path, PurePosixPath

from darkroom.errors import DarkroomError
from darkroom.store.manifest import Digest, Manifest, is_weights
from darkroom.store.node import NodeStore

_READ = frozenset({"model_index.json", "config.json", "darkroom.json", "scheduler_config.json"})
"""Files by which a catalogue is made."""


class Skeleton:
    """The folder, kept equal to the store. Its method blocks."""

    def __init__(self, store: NodeStore, folder: Path) -> None:
        """`folder` is this object's own; what was in it goes."""
        self._store, self.root = store, folder
        self._built: dict[str, Digest] = {}
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)

    def refresh(self) -> dict[str, str]:
        """Brings the folder up to date. Returns the entries for which that failed, and why.

        Raises StoreUnavailable if the store was never read on this node.
        """
        entries = self._store.entries()
        for entry_id in self._built.keys() - entries.keys():
            shutil.rmtree(self.root / entry_id)
            del self._built[entry_id]
        failed: dict[str, str] = {}
        for entry_id, digest in entries.items():
            if self._built.get(entry_id) == digest:
                continue
            try:
                self._build(entry_id, self._store.manifest(entry_id))
                self._built[entry_id] = digest
            except DarkroomError as error:
                failed[entry_id] = error.message
            except OSError as error:
                failed[entry_id] = f"its configs cannot be kept: {error.strerror}"
        return failed

    def _build(self, entry_id: str, manifest: Manifest) -> None:
        self._store.fetch(entry_id, lambda path: PurePosixPath(path).name in _READ)
        partial = self.root / f".{entry_id}"
        shutil.rmtree(partial, ignore_errors=True)
        for path, entry in manifest.files.items():
            file = partial / path
            file.parent.mkdir(parents=True, exist_ok=True)
            if PurePosixPath(path).name in _READ:
                shutil.copyfile(self._store.root / entry_id / path, file)
            elif is_weights(path) and "/" not in path:
                file.write_bytes(self._store.read_header(entry_id, path, entry))
            else:
                file.touch()
            os.truncate(file, entry.size_bytes)
        shutil.rmtree(self.root / entry_id, ignore_errors=True)
        partial.rename(self.root / entry_id)
