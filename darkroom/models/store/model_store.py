"""A stage's model store: files brought to this node where they are not, read into memory, verified, shared."""

import contextlib
import io
import os
import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import TypeVar

import structlog

from darkroom.errors import StoreUnavailable
from darkroom.models.store.device import pin, unpin
from darkroom.models.store.host import Corrupt, HostCache, HostFile
from darkroom.models.store.pool import HostPool
from darkroom.policy.pinning import size_classes
from darkroom.store.evicting import Eviction
from darkroom.store.folder import Folder
from darkroom.store.header import Malformed, TensorFile, read_header
from darkroom.store.indexing import file_digest
from darkroom.store.manifest import Digest
from darkroom.store.source import Afar, Source, Wanted, is_small

_log = structlog.get_logger()
_ATTEMPTS = 2
T = TypeVar("T")
_DEFAULT_NAMES = re.compile(r"(?:diffusion_pytorch_model|model)(?:-[0-9]{5}-of-[0-9]{5})?\.safetensors")
"""Of the weights that diffusers and transformers load if not told otherwise."""


class ModelStore:
    """All that loads models of this process goes through one of these. Its methods block, and run on any thread."""

    def __init__(self, source: Source, host: HostCache) -> None:
        """Over the files of `source`; weights are held in `host`."""
        self._source, self._host = source, host

    @property
    def eviction(self) -> Eviction:
        """What decides what leaves its tiers, and whatever is made of its files."""
        return self._host.eviction

    @property
    def root(self) -> Path:
        """The folder in which an entry's files lie once they are fetched, in a folder of the entry's id."""
        return self._source.root

    def fetch_configs(self, entry_id: str) -> Path:
        """The entry's folder, with all in it but weights. Raises ModelNotFound, UnusableModel or StoreUnavailable."""
        self._source.fetch(entry_id, is_small)
        return self.root / entry_id

    def fetch_weights(self, entry_id: str, *components: str) -> None:
        """Makes sure that the weights of these components can be read; "." is the entry's folder itself."""
        self._source.fetch(entry_id, _weights_in(components))

    def fetch_adapter(self, entry_id: str) -> Path:
        """The entry's folder with all that lies in it, folders apart: a LoRA, or an IP-Adapter without its encoder."""
        self._source.fetch(entry_id, lambda path: "/" not in path)
        return self.root / entry_id

    def adapter_weights(self, entry_id: str) -> list[Path]:
        """Its weights files, fetched or not. Raises ModelNotFound, UnusableModel or StoreUnavailable."""
        return self._source.adapter_weights(entry_id)

    def weights(self, folder: Path) -> list[Path]:
        """The weights files in a folder of the store that can be read, by name, whether they lie there or not."""
        return self._source.weights(folder)

    def read(self, path: Path) -> HostFile:
        """A weights file in memory, verified; fetched once more if it is not as it should be.

        Raises Corrupt, OSError, or what fetching raises.
        """
        return self._mended(path, lambda found: self._read(path, found))

    def header(self, path: Path) -> TensorFile:
        """A weights file's header; fetched once more if it has none.

        Raises Malformed, OSError, or what fetching raises.
        """
        return self._mended(path, self._header_of)

    def size_bytes(self, path: Path) -> int:
        """A weights file's size. Raises OSError."""
        return self._located(path, _size_of)

    def promised(self, path: Path) -> Digest | None:
        """The digest that a file must have; None where nobody promised one."""
        expected = self._source.expected(path)
        return expected.digest if expected else None

    def identity(self, path: Path) -> str:
        """A name that all names of a file share. Raises OSError."""
        promised = self.promised(path)
        if promised is not None:
            return promised
        status = path.stat()
        return f"{status.st_dev}:{status.st_ino}:{status.st_mtime_ns}"

    def held_bytes(self, entry_id: str) -> int:
        """Of an entry's weights files, what is kept in memory."""
        return self._host.held_bytes(entry_id)

    def forget(self, entry_id: str) -> None:
        """Keeps an entry's weights files in memory no longer than networks or other entries use them."""
        self._host.forget(entry_id)

    def verify(self, path: Path) -> None:
        """Makes sure that a file which others will read is as it should be.

        Raises Corrupt, OSError, or StoreUnavailable for one that is not here.
        """
        self._located(path, lambda found: self._verify(path, found))

    def _verify(self, path: Path, found: Path | Afar) -> None:
        if isinstance(found, Afar):
            problem = "this node's disk has no room for its files, and they cannot be read past it"
            raise StoreUnavailable(self._entry_of(path), problem)
        expected = self._source.expected(path)
        if expected is None:
            return
        if file_digest(path) != expected.digest:
            problem = "it has another digest than its manifest names"
            self._source.refuse(path, problem)
            raise Corrupt(problem)

    def _mended(self, path: Path, use: Callable[[Path | Afar], T]) -> T:
        """What comes of using the file where it is, or of using it once it was fetched again. Raises what these do."""
        for attempt in range(1, _ATTEMPTS + 1):
            found = self._source.locate(path)
            try:
                return use(found)
            except FileNotFoundError:  # dropped just now, to make room
                if attempt == _ATTEMPTS:
                    raise
            except (Corrupt, Malformed) as problem:
                _log.error("file_corrupt", folder=path.parent.name, file=path.name, problem=str(problem))
                is_mended = self._source.refuse(found, str(problem)) and attempt < _ATTEMPTS
                if not (is_mended and self._fetch_again(path)):
                    raise
        raise AssertionError

    def _read(self, path: Path, found: Path | Afar) -> HostFile:
        if isinstance(found, Afar):
            return self._host.read_afar(found, self._entry_of(path))
        return self._host.read(path, self._source.expected(path), self._entry_of(path))

    def _located(self, path: Path, use: Callable[[Path | Afar], T]) -> T:
        """What comes of using the file where it is. Raises what `use` does."""
        try:
            return use(self._source.locate(path))
        except FileNotFoundError:  # dropped just now, to make room
            return use(self._source.locate(path))

    def _header_of(self, found: Path | Afar) -> TensorFile:
        if isinstance(found, Afar):
            in_memory = self._host.header(found.entry.digest)
            return in_memory or read_header(io.BytesIO(found.start()), found.entry.size_bytes)
        with found.open("rb") as file:
            return read_header(file, os.fstat(file.fileno()).st_size)

    def _entry_of(self, path: Path) -> str:
        """The entry in whose folder the file lies; empty if in none."""
        for root in (self.root, self.root.resolve()):
            if path.is_relative_to(root):
                return path.relative_to(root).parts[0]
        return ""

    def _fetch_again(self, path: Path) -> bool:
        with contextlib.suppress(ValueError):
            entry_id, _, rest = path.relative_to(self.root).as_posix().partition("/")
            self._source.fetch(entry_id, lambda other: other == rest)
            return True
        return False


def _size_of(found: Path | Afar) -> int:
    return found.entry.size_bytes if isinstance(found, Afar) else found.stat().st_size


def _weights_in(components: tuple[str, ...]) -> Wanted:
    def wanted(path: str) -> bool:
        pure = PurePosixPath(path)
        return str(pure.parent) in components and _DEFAULT_NAMES.fullmatch(pure.name) is not None

    return wanted


def model_store(
    source: Source, *, device: str, pool_bytes: int, host_cache_bytes: int, eviction: Eviction | None = None
) -> ModelStore:
    """The store of a stage: over `source`, with `pool_bytes` of memory made ready for the sizes that it has."""
    pinning = {"pin": pin, "unpin": unpin} if device.startswith("cuda") else {}
    pool = HostPool(idle_bytes=max(pool_bytes, host_cache_bytes), **pinning)
    if pool_bytes:
        pool.prepare(size_classes(source.weights_sizes()), pool_bytes)
    return ModelStore(source, HostCache(pool, limit_bytes=host_cache_bytes, eviction=eviction))


def store_of(where: Path | ModelStore) -> ModelStore:
    """The store; a folder's path stands for the store in that folder, used in place."""
    if isinstance(where, ModelStore):
        return where
    return ModelStore(Folder(where), HostCache(HostPool(idle_bytes=0), limit_bytes=0))
