"""A file that is being fetched, and what is left of one when that was broken off, for whoever goes on with it.

The rule: the file is its own lock (flock), so that a process that dies leaves none. Its last bytes say how many of the
others have come; they are hashed again before more are added.
"""

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from darkroom.store.remote import Begun

_NOTE_BYTES = 8
_READ_BYTES = 8 << 20


class Partial:
    """One of them, that nobody else is fetching."""

    def __init__(self, path: Path, descriptor: int) -> None:
        """`descriptor` is open and locked."""
        self._path, self._descriptor = path, descriptor
        self._size_bytes = self._there = 0

    def room_bytes(self, size_bytes: int) -> int:
        """What it takes of the disk already, towards a file of this size: all of it or nothing."""
        if os.fstat(self._descriptor).st_size != size_bytes + _NOTE_BYTES:
            self.clear()
            return 0
        return size_bytes + _NOTE_BYTES

    def allocate(self, size_bytes: int) -> None:
        """Has room for a file of this size from now on. Raises OSError, and has none then."""
        self.room_bytes(size_bytes)
        try:
            os.posix_fallocate(self._descriptor, 0, size_bytes + _NOTE_BYTES)
        except OSError:
            self.clear()
            raise
        self._size_bytes = size_bytes

    def resume(self) -> Begun:
        """What has come before, hashed."""
        noted = int.from_bytes(os.pread(self._descriptor, _NOTE_BYTES, self._size_bytes), "little")
        self._there = noted if noted <= self._size_bytes else 0
        begun = Begun(self._there)
        offset = 0
        while offset < self._there and (block := self._read(offset)):
            begun.hasher.update(block)
            offset += len(block)
        return begun

    def _read(self, offset: int) -> bytes:
        return os.pread(self._descriptor, min(_READ_BYTES, self._there - offset), offset)

    def add(self, block: bytes) -> None:
        """Adds the next bytes. Raises OSError."""
        self._write(block, self._there)
        self._there += len(block)
        self._write(self._there.to_bytes(_NOTE_BYTES, "little"), self._size_bytes)

    def _write(self, block: bytes, offset: int) -> None:
        written = 0
        while written < len(block):
            written += os.pwrite(self._descriptor, memoryview(block)[written:], offset + written)

    def start_again(self) -> None:
        """Nothing has come; the room stays."""
        self._there = 0
        self._write(bytes(_NOTE_BYTES), self._size_bytes)

    def clear(self) -> None:
        """Is empty, and takes no room."""
        os.ftruncate(self._descriptor, 0)

    def finish(self, target: Path) -> None:
        """What has come is all there is, and has this name from now on. Nobody is to write to it."""
        os.ftruncate(self._descriptor, self._there)
        self._path.rename(target)
        os.fchmod(self._descriptor, 0o444)

    @property
    def is_empty(self) -> bool:
        """Whether nobody could go on with it."""
        return self._there == 0 or os.fstat(self._descriptor).st_size == 0


@contextlib.contextmanager
def taken(path: Path) -> Iterator[Partial | None]:
    """The file, as it was left or new; None if somebody else fetches it. Goes in the end, unless something has come."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        is_ours = try_lock(descriptor, fcntl.LOCK_EX) and _is_at(descriptor, path)
        partial = Partial(path, descriptor) if is_ours else None
        try:
            yield partial
        finally:
            if partial is not None and partial.is_empty and _is_at(descriptor, path):
                path.unlink()
    finally:
        os.close(descriptor)


def discard(path: Path, is_useless: Callable[[os.stat_result], bool]) -> int:
    """Removes a file that nobody is fetching, if it is useless. Returns its bytes, or 0."""
    with contextlib.suppress(FileNotFoundError):
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            status = os.fstat(descriptor)
            is_new = not status.st_size  # just made, by a process about to lock it
            if not is_new and try_lock(descriptor, fcntl.LOCK_EX) and _is_at(descriptor, path) and is_useless(status):
                path.unlink()
                return status.st_size
        finally:
            os.close(descriptor)
    return 0


def try_lock(descriptor: int, kind: int) -> bool:
    """Whether it is locked now."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file still has this name."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
