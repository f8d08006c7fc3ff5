"""The host tier: weights files in memory, read and verified once, kept while room lasts.

On a CPU a network's parameters are these very bytes, and models that have a file in common share them. For a device,
they are what is copied there.

The rule: a file is checked before it is used: its header before anything else, then its digest where one is known, and
every tensor for numbers that are none.
"""

import contextlib
import fcntl
import itertools
import os
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Self
from weakref import WeakValueDictionary

import blake3
import numpy as np
import structlog
import torch

from darkroom.errors import StoreUnavailable
from darkroom.models.store.direct_read import ShortFile, padded_bytes, read_file
from darkroom.models.store.pool import Bytes, HostPool, available_bytes
from darkroom.policy.eviction import Resident
from darkroom.policy.worth import Tier
from darkroom.store.evicting import Eviction
from darkroom.store.header import Beginning, Malformed, Readable, TensorFile, TensorPlace, read_header
from darkroom.store.manifest import Digest, FileEntry
from darkroom.store.source import Afar

_log = structlog.get_logger()
_TYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
}
_CHECKED = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})

Key = tuple[int, int, int, int] | Digest | tuple[Digest]
"""Device, inode, size and time of change: names of one file have one key. Of a file that is afar, its digest.

A tuple of the digest alone is a second key of what was read from the disk, for when that has it no longer: while it
has it, the file there may have gone bad, and is looked at.
"""


class Corrupt(ValueError):
    """The file is not what it should be. The message says how that shows."""


@dataclass(slots=True, weakref_slot=True, eq=False)
class HostFile:
    """A weights file in memory."""

    header: TensorFile
    content: torch.Tensor
    """[size_bytes], uint8: the whole file, in a block of the pool."""
    users: set[str] = field(default_factory=set)
    """Entries of the store that it was read for."""
    used_s: float = field(default_factory=time.monotonic)
    version: int = field(init=False)
    """Of the content as it was read: writing to any view of it counts it up."""

    def __post_init__(self) -> None:
        """Notes the version."""
        self.version = self.content._version  # noqa: SLF001 - torch has no other name for it

    def tensors(self) -> dict[str, torch.Tensor]:
        """Its tensors, in place: views of the content, not to be written to."""
        with torch.inference_mode(mode=False):
            return {name: _view(self.content, place) for name, place in self.header.tensors.items()}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Itself: copies of a network over the same parameters share their file."""
        return self


class HostCache:
    """Files in memory. Its methods block, and may be called from any thread; concurrent reads of a file are one."""

    def __init__(self, pool: HostPool, *, limit_bytes: int, eviction: Eviction | None = None) -> None:
        """`limit_bytes`: of files kept for later use; those in use are not counted out, nor limited."""
        self._pool, self._limit_bytes = pool, limit_bytes
        self.eviction = eviction or Eviction()
        """What decides for the other tiers too."""
        self._evict = self.eviction.of(Tier.HOST, self.held_bytes)
        self._kept: dict[Key, HostFile] = {}
        self._alive: WeakValueDictionary[Key, HostFile] = WeakValueDictionary()
        self._lock = threading.Lock()
        self._reading: dict[Key, threading.Lock] = {}
        self.read_count = 0
        """Files read from the disk since the start."""

    def read(self, path: Path, expected: FileEntry | None, entry_id: str = "") -> HostFile:
        """The file, from memory or from the disk, for an entry of the store. Raises Corrupt, or OSError."""
        came = self._find(expected.digest, entry_id) if expected else None
        if came is not None:  # past the disk, when that was full
            return came
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise Corrupt("it is no regular file")

            def read() -> HostFile:
                fcntl.flock(file, fcntl.LOCK_SH)  # the SSD tier drops nothing that is being read
                return self._read(file, status.st_size, expected)

            key = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
            return self._once(key, entry_id, read)

    def read_afar(self, afar: Afar, entry_id: str) -> HostFile:
        """The file, from memory or past the disk. Raises Corrupt, StoreUnavailable, or what `afar` does."""
        digest = afar.entry.digest
        return self._find((digest,), entry_id) or self._once(digest, entry_id, lambda: self._receive(afar, entry_id))

    def header(self, digest: Digest) -> TensorFile | None:
        """That of a file that is afar, if it is in memory."""
        with self._lock:
            found = self._alive.get(digest) or self._alive.get((digest,))
        return found.header if found is not None else None

    def _once(self, key: Key, entry_id: str, read: Callable[[], HostFile]) -> HostFile:
        with self._lock:
            reading = self._reading.setdefault(key, threading.Lock())
        try:
            with reading:
                found = self._find(key, entry_id)
                if found is None:
                    found = read()
                    found.users.add(entry_id)
                    self._keep(key, found)
                return found
        finally:
            with self._lock:
                self._reading.pop(key, None)

    def forget(self, entry_id: str) -> None:
        """Keeps nothing for the entry's sake any longer; networks that use its files go on with them."""
        with self._lock:
            for key, file in list(self._kept.items()):
                file.users.discard(entry_id)
                if not file.users:
                    del self._kept[key]

    @property
    def kept_bytes(self) -> int:
        """Of the files kept for later use, those of loaded networks among them."""
        with self._lock:
            return self._kept_total()

    def held_bytes(self, entry_id: str) -> int:
        """Of what is kept for an entry. Takes no lock: it is asked while other tiers hold theirs."""
        return sum(file.header.size_bytes for file in list(self._kept.values()) if entry_id in file.users)

    def _find(self, key: Key, entry_id: str) -> HostFile | None:
        with self._lock:
            found = self._alive.get(key)
            if found is not None and found.content._version != found.version:  # noqa: SLF001 - as above
                _log.error("host_file_written_to", tensors=list(found.header.tensors)[:3])
                found = None
            if found is not None:
                found.used_s = time.monotonic()
                found.users.add(entry_id)
            return found

    def _read(self, file: BinaryIO, size_bytes: int, expected: FileEntry | None) -> HostFile:
        if expected is not None and size_bytes != expected.size_bytes:
            raise Corrupt(f"it has {size_bytes} bytes, not {expected.size_bytes}")
        start_s = time.monotonic()
        header = _header(file, size_bytes)
        block = self._pool.take(padded_bytes(size_bytes))
        hasher = blake3.blake3()

        def arriving(hashing: ThreadPoolExecutor) -> Iterator[int]:
            hashed = 0
            for there in read_file(file.fileno(), block, size_bytes):
                if expected is not None:
                    hashing.submit(hasher.update, block.data[hashed:there])
                hashed = there
                yield there

        try:
            with ThreadPoolExecutor(1, thread_name_prefix="hash") as hashing:  # beside the search for bad numbers
                found = _checked(block, header, arriving(hashing))
        except ShortFile as error:
            raise Corrupt(str(error)) from error
        if expected is not None and hasher.hexdigest() != expected.digest:
            raise Corrupt("it has another digest than its manifest names")
        if expected is not None:
            with self._lock:
                self._alive[(expected.digest,)] = found
        self.read_count += 1
        self.eviction.loaded(Tier.HOST, size_bytes, time.monotonic() - start_s)
        return found

    def _receive(self, afar: Afar, entry_id: str) -> HostFile:
        """What comes is verified by who sends it, once all of it has come."""
        start_s, size_bytes = time.monotonic(), afar.entry.size_bytes
        if size_bytes > available_bytes() + self._pool.idle_bytes:
            raise StoreUnavailable(entry_id, f"this node's memory has no room for {size_bytes} bytes of it")
        with contextlib.closing(afar.blocks()) as blocks:
            beginning = Beginning(blocks)
            header = _header(beginning, size_bytes)
            block = self._pool.take(padded_bytes(size_bytes))

            def arriving() -> Iterator[int]:
                there = 0
                for part in itertools.chain([bytes(beginning.taken)], blocks):
                    block[there : there + len(part)] = np.frombuffer(part, np.uint8)
                    there += len(part)
                    yield there

            found = _checked(block, header, arriving())
        self.eviction.loaded(Tier.DISK, size_bytes, time.monotonic() - start_s)
        _log.info("file_streamed", digest=afar.entry.digest[:12], size_bytes=size_bytes)
        return found

    def _keep(self, key: Key, file: HostFile) -> None:
        with self._lock:
            self._alive[key] = file
            self._kept.pop(key, None)  # one that was written to
            names = {str(other): other for other in self._kept}
            needed = self._kept_total() + file.header.size_bytes - self._limit_bytes
            going = [names[name] for name in self._evict(self._residents(), needed)] if needed > 0 else []
            if sum(self._kept[other].header.size_bytes for other in going) >= needed:
                for other in going:
                    del self._kept[other]
                self._kept[key] = file

    def _kept_total(self) -> int:
        return sum(file.header.size_bytes for file in self._kept.values())

    def _residents(self) -> list[Resident]:
        return [
            Resident(
                name=str(key),
                size_bytes=file.header.size_bytes,
                used_s=file.used_s,
                models=tuple(sorted(file.users)),
            )
            for key, file in self._kept.items()
        ]


def _view(content: torch.Tensor, place: TensorPlace) -> torch.Tensor:
    dtype = _TYPES[place.element_type]
    span = content[place.start : place.end]
    if span.data_ptr() % dtype.itemsize or place.start % dtype.itemsize:  # a writer that does not align
        span = span.clone()
    return span.view(dtype).view(place.shape)


def _header(file: Readable, size_bytes: int) -> TensorFile:
    try:
        return read_header(file, size_bytes)
    except Malformed as error:
        raise Corrupt(str(error)) from error


def _checked(block: Bytes, header: TensorFile, arriving: Iterable[int]) -> HostFile:
    """The file that arrives in the block, its tensors looked through as they come. Raises Corrupt."""
    with torch.inference_mode(mode=False):  # whoever asks: others share it, and inference tensors have no version
        content = torch.from_numpy(block)[: header.size_bytes]
    check = _checker(content, header)
    for there in arriving:
        check(there)
    return HostFile(header, content)


def _checker(content: torch.Tensor, header: TensorFile) -> Callable[[int], None]:
    """Checks tensors as far as they are there, each once. What it makes raises Corrupt."""
    waiting = sorted(header.tensors.items(), key=lambda item: -item[1].end)

    def check(there: int) -> None:
        while waiting and waiting[-1][1].end <= there:
            name, place = waiting.pop()
            if _has_nan(_view(content, place)):
                raise Corrupt(f"tensor {name[:64]} has values that are no numbers")

    return check


def _has_nan(tensor: torch.Tensor) -> bool:
    """By the largest value: one that is no number goes through."""
    return tensor.dtype in _CHECKED and tensor.numel() > 0 and bool(tensor.max().isnan())


def uses(network: torch.nn.Module, files: list[HostFile]) -> bool:
    """Whether any of the network's parameters lies in these files' bytes."""
    blocks = {file.content.untyped_storage().data_ptr() for file in files}
    return any(p.untyped_storage().data_ptr() in blocks for p in network.parameters() if p.device.type == "cpu")


def merged(files: list[HostFile]) -> Mapping[str, torch.Tensor]:
    """The tensors of several files. Raises Corrupt if two have one of the same name."""
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        own = file.tensors()
        if clash := own.keys() & tensors.keys():
            raise Corrupt(f"tensor {min(clash)[:64]} is in two files")
        tensors |= own
    return tensors
