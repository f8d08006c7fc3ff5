"""A model store that is a folder here: its files are used in place, and never changed.

Where it has an index (`darkroom store index`), what the index names is verified; without one, nobody said what the
files should be.
"""

import contextlib
import os
import threading
from pathlib import Path

import structlog

from darkroom.store.header import Malformed
from darkroom.store.manifest import (
    INDEX_PATH,
    MAX_JSON_BYTES,
    FileEntry,
    Index,
    Manifest,
    digest_of,
    is_weights,
    manifest_path,
)
from darkroom.store.source import Afar, Wanted, weights_in

_log = structlog.get_logger()


class Folder:
    """A `Source` whose files are all here."""

    def __init__(self, root: Path) -> None:
        """`root` may have an index, now or later."""
        self._root = root
        self._lock = threading.Lock()
        self._seen: tuple[int, int] | None = None
        self._manifests: dict[str, Manifest] = {}

    @property
    def root(self) -> Path:
        """The folder."""
        return self._root

    def fetch(self, entry_id: str, wanted: Wanted) -> None:
        """Nothing to do."""

    def weights(self, folder: Path) -> list[Path]:
        """Those that lie there."""
        return weights_in(folder)

    def adapter_weights(self, entry_id: str) -> list[Path]:
        """Those that lie there."""
        return weights_in(self._root / entry_id)

    def locate(self, path: Path) -> Path:
        """The path."""
        return path

    def weights_sizes(self) -> dict[int, float]:
        """Of all in the folder."""
        counts: dict[int, float] = {}
        for base, _, names in os.walk(self._root):
            for name in names:
                if is_weights(name):
                    with contextlib.suppress(OSError):
                        size_bytes = Path(base, name).stat().st_size
                        counts[size_bytes] = counts.get(size_bytes, 0.0) + 1.0
        return counts

    def expected(self, path: Path) -> FileEntry | None:
        """What the index says of the file; of a link, what it says of the link."""
        root = next((root for root in (self._root, self._root.resolve()) if path.is_relative_to(root)), None)
        if root is None:
            return None
        entry_id, _, rest = path.relative_to(root).as_posix().partition("/")
        with self._lock:
            self._read_index()
            manifest = self._manifests.get(entry_id)
        return manifest.files.get(rest) if manifest else None

    def refuse(self, found: Path | Afar, problem: str) -> bool:
        """The file stays where it is, and is refused each time until somebody repairs it."""
        assert isinstance(found, Path)
        _log.error("file_refused", folder=found.parent.name, file=found.name, problem=problem)
        return False

    def _read_index(self) -> None:
        """Reads the index if it has changed. One that cannot be read is as good as none, and logged."""
        file = self._root / INDEX_PATH
        try:
            status = file.stat()
        except OSError:
            self._seen, self._manifests = None, {}
            return
        if self._seen == (status.st_mtime_ns, status.st_ino):
            return
        self._seen = (status.st_mtime_ns, status.st_ino)
        try:
            index = Index.from_json(_read(file))
            self._manifests = {
                entry_id: Manifest.from_json(_read(self._root / manifest_path(digest), digest))
                for entry_id, digest in index.entries.items()
            }
        except (OSError, Malformed) as error:
            self._manifests = {}
            _log.error("store_index_unreadable", problem=str(error)[:200])


def _read(file: Path, digest: str | None = None) -> bytes:
    with file.open("rb") as opened:
        text = opened.read(MAX_JSON_BYTES + 1)
    if digest is not None and digest_of(text) != digest:
        raise Malformed(f"{file.name} has another digest than the index names")
    return text
