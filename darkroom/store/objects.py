"""The SSD tier: files named by their digest, of bounded size together, shared by the processes of a node.

The rule: a file has its name only once it is whole and verified, and one process fetches it while the others wait.
What is being fetched lies aside and is its own lock (flock), so that a process that dies leaves neither file nor lock.
"""

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import blake3
import structlog

from darkroom.errors import StoreUnavailable
from darkroom.policy.eviction import Resident
from darkroom.policy.worth import Tier
from darkroom.store.evicting import Eviction
from darkroom.store.header import Malformed
from darkroom.store.manifest import Digest, FileEntry
from darkroom.store.remote import seconds_for

_log = structlog.get_logger()
_POLL_S = 0.02
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_MAX_QUARANTINED = 4


class Objects:
    """Files by digest. Its methods block, and may be called from any thread."""

    def __init__(
        self, folder: Path, limit_bytes: int, eviction: Eviction, users: Callable[[], Mapping[Digest, tuple[str, ...]]]
    ) -> None:
        """`folder` holds these files, and in `stores` names for them that go when they do.

        `users`: ids of the entries that have each file, as far as is known without asking anybody.
        """
        self._folder, self._limit_bytes, self._users = folder, limit_bytes, users
        self._eviction = eviction
        self._evict = eviction.of(Tier.DISK, lambda _: 0)  # nothing nearer is kept for its sake
        for name in ("objects", "partial", "quarantine", "stores"):
            (folder / name).mkdir(parents=True, exist_ok=True)

    def path(self, digest: Digest) -> Path:
        """Where the file is if it is here."""
        return self._folder / "objects" / digest

    def find(self, digest: Digest) -> Path | None:
        """The file, noted as used now; None if it is not here."""
        path = self.path(digest)
        try:  # the time of change stays: by it, whoever has read the file knows that it is still the same
            os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
        except FileNotFoundError:
            return None
        return path

    def bring(self, entry: FileEntry, blocks: Callable[[], Iterable[bytes]]) -> Path:
        """The file, fetched as `blocks` if it is not here; all who want it at once share one fetch.

        Raises Malformed for bytes that are not the entry's, StoreUnavailable, and what `blocks` raises.
        """
        deadline_s = time.monotonic() + seconds_for(entry.size_bytes)
        while True:
            if found := self.find(entry.digest):
                return found
            with self._locked(entry.digest) as partial:
                if partial is None:
                    if time.monotonic() > deadline_s:
                        raise StoreUnavailable(entry.digest[:12], "another process has been fetching it for too long")
                    time.sleep(_POLL_S)
                elif not self.find(entry.digest):  # or else it came while this waited
                    self._fetch(partial, entry, blocks)

    def quarantine(self, digest: Digest) -> None:
        """Takes a file that is not what its name says out of use, and keeps it for whoever looks into it."""
        path = self.path(digest)
        with contextlib.suppress(FileNotFoundError):
            self._forget(path)
            path.replace(self._folder / "quarantine" / f"{digest}.{time.time_ns()}")
            _log.error("file_quarantined", digest=digest)
        for old in sorted((self._folder / "quarantine").iterdir(), key=_used_s)[:-_MAX_QUARANTINED]:
            old.unlink(missing_ok=True)

    def held_bytes(self) -> int:
        """Of all that lies in the tier's folder, what is being fetched included."""
        return sum(size for _, size in self._sizes("objects", "partial", "quarantine"))

    @contextlib.contextmanager
    def _locked(self, digest: Digest) -> Iterator[int | None]:
        """The descriptor of the file that is being fetched, held by nobody else; None if somebody else fetches."""
        path = self._folder / "partial" / digest
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            is_ours = _try_lock(descriptor, fcntl.LOCK_EX) and _is_at(descriptor, path)
            yield descriptor if is_ours else None
            if is_ours and _is_at(descriptor, path):
                path.unlink()
        except BaseException:
            if _try_lock(descriptor, fcntl.LOCK_EX) and _is_at(descriptor, path):
                path.unlink()
            raise
        finally:
            os.close(descriptor)

    def _fetch(self, partial: int, entry: FileEntry, blocks: Callable[[], Iterable[bytes]]) -> None:
        start_s = time.monotonic()
        self._reserve(partial, entry)
        hasher, offset = blake3.blake3(), 0
        try:
            for block in blocks():
                hasher.update(block)
                offset += _write(partial, block, offset)
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            raise _no_room(entry) from error
        if offset != entry.size_bytes or hasher.hexdigest() != entry.digest:
            raise Malformed("what the store sent has not the digest that its manifest names")
        os.fchmod(partial, 0o444)
        (self._folder / "partial" / entry.digest).rename(self.path(entry.digest))
        took_s = time.monotonic() - start_s
        self._eviction.loaded(Tier.DISK, entry.size_bytes, took_s)
        _log.info("file_fetched", digest=entry.digest[:12], size_bytes=entry.size_bytes, fetch_s=round(took_s, 3))

    def _reserve(self, partial: int, entry: FileEntry) -> None:
        """Room for the file, before a byte is fetched. Raises StoreUnavailable."""
        os.ftruncate(partial, 0)
        with self._deciding():
            self._sweep()
            needed = self.held_bytes() + entry.size_bytes - self._limit_bytes
            if entry.size_bytes > self._limit_bytes or (needed > 0 and self._drop(needed) < needed):
                raise _no_room(entry)
            try:
                _allocate(partial, entry.size_bytes)
            except OSError as error:
                if error.errno not in _NO_ROOM:
                    raise
                self._drop(entry.size_bytes)  # others use the disk too
                _allocate_or_refuse(partial, entry)

    @contextlib.contextmanager
    def _deciding(self) -> Iterator[None]:
        """One process at a time makes room."""
        descriptor = os.open(self._folder / "room.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _drop(self, needed_bytes: int) -> int:
        """Bytes that are free now, of quarantined files first, then of what the policy chooses and nobody reads."""
        freed = 0
        for path, size_bytes in self._sizes("quarantine"):
            path.unlink(missing_ok=True)
            freed += size_bytes
        users = self._users() if freed < needed_bytes else {}
        residents = {
            path.name: Resident(
                name=path.name, size_bytes=size, used_s=_used_s(path), models=users.get(Digest(path.name), ())
            )
            for path, size in self._sizes("objects")
        }
        while freed < needed_bytes:
            chosen = [residents.pop(name) for name in self._evict([*residents.values()], needed_bytes - freed)]
            if not chosen:
                break
            freed += sum(int(each.size_bytes) for each in chosen if self._drop_one(self.path(Digest(each.name))))
        return freed

    def _drop_one(self, path: Path) -> bool:
        """Whether it was there, and nobody was reading it."""
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            if not _try_lock(descriptor, fcntl.LOCK_EX):
                return False
            self._forget(path)
            path.unlink(missing_ok=True)
            _log.info("file_dropped", digest=path.name[:12])
            return True
        finally:
            os.close(descriptor)

    def _forget(self, path: Path) -> None:
        """Removes every other name of the file."""
        inode = path.stat().st_ino
        for base, _, names in os.walk(self._folder / "stores"):
            for name in names:
                other = Path(base, name)
                with contextlib.suppress(FileNotFoundError):
                    if other.stat().st_ino == inode:
                        other.unlink()

    def _sweep(self) -> None:
        """Removes what processes that died were fetching."""
        for path, size_bytes in self._sizes("partial"):
            if not size_bytes:
                continue  # just made, by a process about to lock it
            with contextlib.suppress(FileNotFoundError):
                descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
                try:
                    if _try_lock(descriptor, fcntl.LOCK_EX) and _is_at(descriptor, path):
                        path.unlink()
                finally:
                    os.close(descriptor)

    def _sizes(self, *folders: str) -> list[tuple[Path, int]]:
        found = []
        for folder in folders:
            for path in sorted((self._folder / folder).iterdir()):
                with contextlib.suppress(FileNotFoundError):
                    found.append((path, path.stat().st_size))
        return found


def _used_s(path: Path) -> float:
    try:
        return path.stat().st_atime
    except FileNotFoundError:
        return 0.0


def _try_lock(descriptor: int, kind: int) -> bool:
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


def _write(descriptor: int, block: bytes, offset: int) -> int:
    written = 0
    while written < len(block):
        written += os.pwrite(descriptor, memoryview(block)[written:], offset + written)
    return written


def _allocate(descriptor: int, size_bytes: int) -> None:
    if size_bytes:
        os.posix_fallocate(descriptor, 0, size_bytes)


def _allocate_or_refuse(descriptor: int, entry: FileEntry) -> None:
    try:
        _allocate(descriptor, entry.size_bytes)
    except OSError as error:
        raise _no_room(entry) from error


def _no_room(entry: FileEntry) -> StoreUnavailable:
    return StoreUnavailable(entry.digest[:12], f"this node's disk has no room for its {entry.size_bytes} bytes")
