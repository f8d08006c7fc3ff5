"""A model store elsewhere, as a folder of this node: files come when they are wanted, verified, and are shared.

    CACHE/objects/DIGEST            what is here (see `objects`)
    CACHE/stores/KEY/.darkroom/     the store's index and manifests, as last read
    CACHE/stores/KEY/ENTRY/FILE     the store's names: hard links to objects

The rule: with the store down, what is here still serves; with the disk full, what is not here does.
"""

import contextlib
import os
import secrets
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import blake3
import structlog

from darkroom.errors import DarkroomError, ModelNotFound, StoreUnavailable, UnusableModel
from darkroom.store.evicting import Eviction
from darkroom.store.header import LENGTH_BYTES, MAX_HEADER_BYTES, Malformed
from darkroom.store.indexing import write_atomically
from darkroom.store.manifest import (
    FOLDER,
    INDEX_PATH,
    MAX_JSON_BYTES,
    Digest,
    FileEntry,
    Index,
    Manifest,
    digest_of,
    is_weights,
    manifest_path,
)
from darkroom.store.objects import Fetch, NoRoom, Objects, refusing
from darkroom.store.remote import Remote, Torn
from darkroom.store.source import Afar, Wanted, weights_in

_log = structlog.get_logger()
_CONCURRENT_FILES = 4
"""Fetched at once for one entry."""
_ATTEMPTS = 2
"""At fetching a file that is not what it should be on this node's disk."""
_PATIENCE_S = 1.0
"""How long a newer index is waited for where there is one."""
_REFUSED_S = 30.0
"""How long a file that the store itself has wrong is not fetched again."""
_HEADER_BYTES = 64 << 10
"""Asked for at first: most headers are smaller."""


class NodeStore:
    """A `Source` over a remote store and this node's SSD."""

    def __init__(
        self,
        url: str,
        cache: Path,
        *,
        limit_bytes: int,
        refresh_s: float = 5.0,
        eviction: Eviction | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`limit_bytes`: of the cache; `refresh_s`: for how long the store's index is taken for new."""
        self._remote = Remote(url)
        self._objects = Objects(cache, limit_bytes, eviction or Eviction(), self._users)
        self._root = cache.resolve() / "stores" / blake3.blake3(url.rstrip("/").encode()).hexdigest(16)
        (self._root / FOLDER / "manifests").mkdir(parents=True, exist_ok=True)
        self._limit_bytes, self._refresh_s, self._clock = limit_bytes, refresh_s, clock
        self._lock, self._reader = threading.Lock(), ThreadPoolExecutor(1, thread_name_prefix="index")
        self._reading: Future[None] | None = None
        self._began_s = -float("inf")
        """When that began."""
        self._index: Index | None = None
        self._read_s = -float("inf")
        self._manifests: dict[Digest, Manifest] = {}
        self._refused: dict[Digest, tuple[float, str]] = {}
        self._readable: set[Digest] = set()
        """Weights that were wanted and can be read, wherever they are by now: others may have dropped them here."""
        self._afar: set[Digest] = set()
        """Those of them that the disk had no room for when they were last wanted."""

    @property
    def root(self) -> Path:
        """Where the names lie."""
        return self._root

    def entries(self) -> Mapping[str, Digest]:
        """The digest of each entry's manifest. Raises StoreUnavailable if the store was never read here."""
        return self._current_index().entries

    def manifest(self, entry_id: str) -> Manifest:
        """The files of an entry. Raises ModelNotFound, UnusableModel or StoreUnavailable."""
        digest = self.entries().get(entry_id)
        if digest is None:
            raise ModelNotFound(entry_id)
        found = self._manifests.get(digest)
        if found is None:
            try:
                found = self._manifests[digest] = Manifest.from_json(self._read_manifest(digest))
            except Malformed as error:
                raise UnusableModel(entry_id, "its manifest in the model store is malformed") from error
            except StoreUnavailable as error:
                raise StoreUnavailable(entry_id, _shown(error)) from error
        return found

    def fetch(self, entry_id: str, wanted: Wanted) -> None:
        """Brings the wanted files here and verifies small ones anew; names that are no longer current go."""
        manifest = self.manifest(entry_id)
        folder = self._root / entry_id
        chosen = {path: entry for path, entry in manifest.files.items() if wanted(path)}
        beside = frozenset(entry.digest for entry in chosen.values())
        self._remove_outdated(folder, manifest)
        with ThreadPoolExecutor(_CONCURRENT_FILES, thread_name_prefix="fetch") as pool:
            for done in [pool.submit(self._bring, entry_id, path, entry, beside) for path, entry in chosen.items()]:
                done.result()

    def weights(self, folder: Path) -> list[Path]:
        """Those that lie there, and those that were fetched, whether the disk has kept them or not."""
        entry_id, _, rest = folder.relative_to(self._root).as_posix().partition("/")
        manifest = self._known(entry_id) or Manifest()
        readable = [
            self._root / entry_id / path
            for path, entry in manifest.files.items()
            if entry.digest in self._readable and PurePosixPath(path).parent == PurePosixPath(rest)
        ]
        return sorted({*readable, *weights_in(folder)})

    def adapter_weights(self, entry_id: str) -> list[Path]:
        """By the entry's manifest."""
        files = self.manifest(entry_id).files
        return [self._root / entry_id / path for path in files if "/" not in path and is_weights(path)]

    def locate(self, path: Path) -> Path | Afar:
        """Afar is what the manifest names and was not kept, or is no longer: it was dropped to make room."""
        entry = None if path.is_file() else self.expected(path)
        if entry is None:
            return path
        entry_id, _, rest = path.relative_to(self._root).as_posix().partition("/")
        return Afar(entry, lambda: self._stream(entry_id, rest, entry), lambda: self.read_header(entry_id, rest, entry))

    def weights_sizes(self) -> dict[int, float]:
        """By the manifests that can be read."""
        counts: dict[int, float] = {}
        with contextlib.suppress(StoreUnavailable):
            for entry_id in self.entries():
                with contextlib.suppress(DarkroomError):
                    for path, entry in self.manifest(entry_id).files.items():
                        if is_weights(path):
                            counts[entry.size_bytes] = counts.get(entry.size_bytes, 0.0) + 1.0
        return counts

    def expected(self, path: Path) -> FileEntry | None:
        """By the manifest of the file's entry; None for a file that it does not name."""
        if not path.is_relative_to(self._root):
            return None
        entry_id, _, rest = path.relative_to(self._root).as_posix().partition("/")
        try:
            return (self._known(entry_id) or self.manifest(entry_id)).files.get(rest)
        except (ModelNotFound, UnusableModel, StoreUnavailable):
            return None

    def refuse(self, found: Path | Afar, problem: str) -> bool:
        """Quarantines the file under all its names; one that is afar is not read again for a while."""
        if isinstance(found, Afar):
            self._note_refused(found.entry.digest, problem)
            return False
        entry = self.expected(found)
        if entry is not None:
            self._objects.quarantine(entry.digest)
        return entry is not None

    def read_header(self, entry_id: str, path: str, entry: FileEntry) -> bytes:
        """The file's first bytes in the store up to the end of its header, not verified; fewer where that is none.

        Raises StoreUnavailable.
        """
        with self._explained(entry_id, path, entry):
            start = self._remote.read(f"{entry_id}/{path}", _HEADER_BYTES)
            end = LENGTH_BYTES + int.from_bytes(start[:LENGTH_BYTES], "little")
            if len(start) < end <= MAX_HEADER_BYTES:
                return self._remote.read(f"{entry_id}/{path}", end)
            return start[:end]

    def _known(self, entry_id: str) -> Manifest | None:
        """The files of an entry, as they were when they were last wanted; None if they were not. Asks nobody."""
        digest = self._index.entries.get(entry_id) if self._index else None
        return self._manifests.get(digest) if digest else None

    def _users(self) -> dict[Digest, tuple[str, ...]]:
        """Entries by the files that they have, of all whose manifest is on this node."""
        found: dict[Digest, tuple[str, ...]] = {}
        for entry_id, digest in self._index.entries.items() if self._index else ():
            with contextlib.suppress(OSError, Malformed):
                if digest not in self._manifests:
                    self._manifests[digest] = Manifest.from_json(self._kept_manifest(digest))
                for file in {entry.digest for entry in self._manifests[digest].files.values()}:
                    found[file] = (*found.get(file, ()), entry_id)
        return found

    def _bring(self, entry_id: str, path: str, entry: FileEntry, beside: frozenset[Digest]) -> None:
        """Brings a file here. Weights stay afar if the disk has no room for them."""
        self._check_refused(entry_id, path, entry.digest)
        with self._explained(entry_id, path, entry):
            try:
                self._keep(entry_id, path, entry, beside)
                self._afar.discard(entry.digest)
            except NoRoom as problem:
                if not is_weights(path):
                    what = f"this node's disk has no room, not even for {path} of {entry.size_bytes} bytes"
                    raise StoreUnavailable(entry_id, what) from problem
                self._leave_afar(entry_id, path, entry)
        if is_weights(path):
            self._readable.add(entry.digest)

    def _keep(self, entry_id: str, path: str, entry: FileEntry, beside: frozenset[Digest]) -> None:
        """Raises NoRoom, and what fetching raises."""
        fetch = Fetch(
            entry=entry,
            blocks=lambda begun: self._remote.stream(f"{entry_id}/{path}", entry, begun),
            is_small=not is_weights(path),
            beside=beside,
        )
        for attempt in range(1, _ATTEMPTS + 1):
            found = None
            try:
                with refusing():
                    found = self._objects.bring(fetch)
                    if _name(found, entry, path, self._root / entry_id / path):
                        return
            except NoRoom:
                may_take = fetch.is_small or found is not None  # the room kept aside is for names too
                if attempt == _ATTEMPTS or not (may_take and self._objects.give_way()):
                    raise
            else:
                self._objects.quarantine(entry.digest)
        if is_weights(path):
            raise NoRoom  # it is dropped as soon as it comes
        raise StoreUnavailable(entry_id, "its files do not stay on this node's disk")

    def _leave_afar(self, entry_id: str, path: str, entry: FileEntry) -> None:
        if entry.digest not in self._afar:
            self._afar.add(entry.digest)
            held_bytes, free_bytes = self._objects.held_bytes(), self._objects.free_bytes()
            sizes = {"limit_bytes": self._limit_bytes, "held_bytes": held_bytes, "free_bytes": free_bytes}
            _log.warning("disk_full", entry_id=entry_id, file=path, size_bytes=entry.size_bytes, **sizes)

    def _stream(self, entry_id: str, path: str, entry: FileEntry) -> Generator[bytes, None, None]:
        """The file's blocks past the disk, refused as if they were fetched there."""
        self._check_refused(entry_id, path, entry.digest)
        with self._explained(entry_id, path, entry):
            yield from self._remote.stream(f"{entry_id}/{path}", entry)

    @contextlib.contextmanager
    def _explained(self, entry_id: str, path: str, entry: FileEntry) -> Iterator[None]:
        """What goes wrong with a file of the store inside, in terms of its entry."""
        try:
            yield
        except FileNotFoundError as error:
            raise StoreUnavailable(entry_id, "the store lacks a file that its manifest names") from error
        except Malformed as error:
            self._note_refused(entry.digest, str(error))
            _log.error("file_refused", entry_id=entry_id, file=path, problem=str(error))
            raise UnusableModel(
                entry_id, f"its file {path} in the model store is not what its manifest says"
            ) from error
        except (StoreUnavailable, Torn) as error:
            _log.warning("fetch_failed", entry_id=entry_id, file=path, problem=str(error), cause=repr(error.__cause__))
            raise StoreUnavailable(entry_id, _shown(error)) from error

    def _note_refused(self, digest: Digest, problem: str) -> None:
        self._refused[digest] = (self._clock() + _REFUSED_S, problem)

    def _check_refused(self, entry_id: str, path: str, digest: Digest) -> None:
        until_s, problem = self._refused.get(digest, (0.0, ""))
        if until_s > self._clock():
            raise UnusableModel(entry_id, f"its file {path} in the model store is not what its manifest says") from (
                Malformed(problem)
            )

    def _remove_outdated(self, folder: Path, manifest: Manifest) -> None:
        """Removes names that the manifest does not have, or has for other files."""
        for base, _, names in os.walk(folder):
            for name in names:
                file = Path(base, name)
                entry = manifest.files.get(file.relative_to(folder).as_posix())
                is_current = entry is not None and _is_same(file, self._objects.path(entry.digest))
                if not is_current and not name.startswith("."):  # which is a name in the making
                    file.unlink(missing_ok=True)

    def _current_index(self) -> Index:
        """The index, read anew when it is due; all who want it share one read, and one wait where there is an older."""
        with self._lock:
            if self._clock() - self._read_s >= self._refresh_s and (self._reading is None or self._reading.done()):
                self._reading = self._reader.submit(self._refresh)
                self._began_s = self._clock()
            reading, known = self._reading, self._index
            left_s = max(self._began_s + _PATIENCE_S - self._clock(), 0.0)
        if reading is not None:
            try:
                reading.result(timeout=None if known is None else left_s)
            except TimeoutError:
                if left_s:
                    _log.warning("store_index_is_slow")
        assert self._index is not None
        return self._index

    def _refresh(self) -> None:
        self._index = self._read_index()
        self._read_s = self._clock()

    def _read_index(self) -> Index:
        file = self._root / INDEX_PATH
        try:
            text = self._remote.read(INDEX_PATH, MAX_JSON_BYTES + 1)
            index = Index.from_json(text)
        except (FileNotFoundError, StoreUnavailable, Malformed) as error:
            if self._index is not None:
                _log.warning("store_index_not_read", problem=str(error)[:200], cause=repr(error.__cause__)[:200])
                return self._index
            try:
                return Index.from_json(file.read_bytes())
            except (OSError, Malformed):
                raise StoreUnavailable("its index", _shown(error)) from error
        _write_down(file, text)
        return index

    def _read_manifest(self, digest: Digest) -> bytes:
        """Raises StoreUnavailable, or Malformed."""
        with contextlib.suppress(FileNotFoundError, Malformed):
            return self._kept_manifest(digest)
        try:
            text = self._remote.read(manifest_path(digest), MAX_JSON_BYTES + 1)
        except FileNotFoundError as error:
            raise StoreUnavailable("a manifest", "the store lacks it") from error
        if digest_of(text) != digest:
            raise Malformed("the manifest has another digest than the index names")
        _write_down(self._root / manifest_path(digest), text)
        return text

    def _kept_manifest(self, digest: Digest) -> bytes:
        """As it is on this node. Raises FileNotFoundError, or Malformed."""
        text = (self._root / manifest_path(digest)).read_bytes()
        if digest_of(text) != digest:
            raise Malformed("the manifest on this node's disk is not what was fetched")
        return text


def _write_down(file: Path, text: bytes) -> None:
    """For when the store is down: this process knows it anyway."""
    try:
        write_atomically(file, text)
    except OSError as error:
        _log.warning("not_written_down", file=file.name, problem=repr(error))


def _shown(error: Exception) -> str:
    """What a caller may know of why: no paths, no addresses."""
    if isinstance(error, StoreUnavailable):
        return error.facts["problem"]
    if isinstance(error, Torn):
        return str(error)
    return "its index is malformed" if isinstance(error, Malformed) else "it has no index"


def _is_same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except FileNotFoundError:
        return False


def _name(found: Path, entry: FileEntry, path: str, name: Path) -> bool:
    """Whether the object is sound, as far as can be seen at once, and now has this name in place of what had it."""
    if _is_same(name, found):
        return is_weights(path) or digest_of(name.read_bytes()) == entry.digest
    name.parent.mkdir(parents=True, exist_ok=True)
    partial = name.with_name(f".{name.name}.{secrets.token_hex(4)}")
    try:
        os.link(found, partial)
        if not is_weights(path) and digest_of(partial.read_bytes()) != entry.digest:
            return False
        partial.replace(name)
    except FileNotFoundError:  # dropped meanwhile, to make room
        return False
    finally:
        partial.unlink(missing_ok=True)
    return True
