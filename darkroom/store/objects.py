"""The SSD tier: files named by their digest, of bounded size together, shared by the processes of a node.

The rule: a file has its name only once it is whole and verified, and one process fetches it while the others wait.
What is being fetched lies aside (see `partial`), and what was broken off is gone on with.
"""

import contextlib
import errno
import fcntl
import functools
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import structlog

from darkroom.errors import StoreUnavailable
from darkroom.policy.eviction import Resident
from darkroom.policy.worth import Tier
from darkroom.store.evicting import Eviction
from darkroom.store.header import Malformed
from darkroom.store.indexing import file_digest
from darkroom.store.manifest import Digest, FileEntry
from darkroom.store.partial import Partial, discard, taken, try_lock
from darkroom.store.remote import Begun, Torn, seconds_for
from darkroom.store.spare import Spare

_log = structlog.get_logger()
_POLL_S = 0.02
_FULL = (errno.ENOSPC, errno.EDQUOT)
_MAX_QUARANTINED = 4
_BESIDE_BYTES = 64 << 10
"""What a file system may take with a file: blocks are whole, and so is what says where they are."""
_LEFT_S = 3600.0
"""How long what was broken off waits for somebody to go on with it, unless room is needed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetch:
    """A file that is wanted here."""

    entry: FileEntry
    blocks: Callable[[Begun], Iterator[bytes]]
    """Fetches what is not here yet."""
    is_small: bool = False
    """Whether it may have the room that is kept aside."""
    beside: frozenset[Digest] = frozenset()
    """What is wanted with it, and does not go for it."""


class NoRoom(Exception):
    """The disk cannot take a file, whatever else would go."""


@contextlib.contextmanager
def refusing() -> Iterator[None]:
    """Inside, a full disk raises NoRoom."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise NoRoom from error


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
        self._spare = Spare(folder / "spare", limit_bytes)
        self.weights_limit_bytes = limit_bytes - self._spare.most_bytes
        """Of what is not small."""
        with contextlib.suppress(NoRoom), refusing(), self._deciding():
            self._spare.fill()

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

    def bring(self, fetch: Fetch) -> Path:
        """The file, fetched if it is not here; all who want it at once share one fetch.

        Raises NoRoom, StoreUnavailable, and what its blocks raise.
        """
        entry, deadline_s = fetch.entry, time.monotonic() + seconds_for(fetch.entry.size_bytes)
        while True:
            if found := self.find(entry.digest):
                return found
            with refusing(), taken(self._folder / "partial" / entry.digest) as partial:
                if partial is None:
                    if time.monotonic() > deadline_s:
                        raise StoreUnavailable(entry.digest[:12], "another process has been fetching it for too long")
                    time.sleep(_POLL_S)
                elif not self.find(entry.digest):  # or else it came while this waited
                    self._fetch(partial, fetch)

    def give_way(self) -> bool:
        """Makes room for a few names, of what is kept aside. Returns whether it could."""
        with self._deciding():
            return self._spare.give(0)

    def quarantine(self, digest: Digest) -> None:
        """Takes a file that is not what its name says out of use, and keeps it for whoever looks into it.

        One that is goes on: somebody else has found the wrong one, too, and fetched it again.
        """
        path = self.path(digest)
        with contextlib.suppress(FileNotFoundError):
            if file_digest(path) == digest:
                return
            self._forget(path)
            path.replace(self._quarantined(digest))
            _log.error("file_quarantined", digest=digest)

    def _quarantined(self, digest: Digest) -> Path:
        """A name for the file there. If there are many, the oldest goes."""
        folder = self._folder / "quarantine"
        others = [path for path in folder.iterdir() if path.name != digest]
        for old in sorted(others, key=_used_s)[: 1 - _MAX_QUARANTINED]:
            old.unlink(missing_ok=True)
        return folder / digest

    def free_bytes(self) -> int:
        """Of the disk."""
        status = os.statvfs(self._folder)
        return status.f_bavail * status.f_frsize

    def held_bytes(self) -> int:
        """Of all that lies in the tier's folder, what is being fetched included."""
        return sum(size for _, size in self._sizes("objects", "partial", "quarantine"))

    def _fetch(self, partial: Partial, fetch: Fetch) -> None:
        start_s, entry = time.monotonic(), fetch.entry
        self._reserve(partial, fetch)
        begun = partial.resume()
        try:
            try:
                _receive(partial, fetch.blocks(begun))
            except Torn as problem:
                _log.warning("fetch_starts_again", digest=entry.digest[:12], cause=repr(problem.__cause__))
                partial.start_again()
                _receive(partial, fetch.blocks(Begun()))
        except Malformed:
            if not partial.is_empty:
                partial.finish(self._quarantined(entry.digest))
            raise
        except (Torn, NoRoom, OSError):
            partial.clear()
            raise
        partial.finish(self.path(entry.digest))
        took_s = time.monotonic() - start_s
        if not begun.size_bytes:
            self._eviction.loaded(Tier.DISK, entry.size_bytes, took_s)
        _log.info(
            "file_fetched",
            digest=entry.digest[:12],
            size_bytes=entry.size_bytes,
            resumed_bytes=begun.size_bytes,
            fetch_s=round(took_s, 3),
        )

    def _reserve(self, partial: Partial, fetch: Fetch) -> None:
        """Room for the file, before a byte is fetched.

        Raises NoRoom, and has dropped nothing for it then, unless others have taken what that left.
        """
        size_bytes = fetch.entry.size_bytes
        limit_bytes = self._limit_bytes if fetch.is_small else self.weights_limit_bytes
        with self._deciding():
            self._sweep()
            left_bytes = partial.room_bytes(size_bytes)
            over_bytes = self.held_bytes() - left_bytes + size_bytes - limit_bytes
            if not fetch.is_small:
                self._spare.fill()
            if size_bytes > limit_bytes:
                raise NoRoom
            lacking_bytes = self._take(partial, fetch)
            needed = max(over_bytes, lacking_bytes)
            if needed > 0 and self._drop(needed, fetch.beside) < needed:
                if not left_bytes:
                    partial.clear()
                self._spare.fill()
                raise NoRoom
            if lacking_bytes and not _allocated(partial, size_bytes):
                raise NoRoom

    def _take(self, partial: Partial, fetch: Fetch) -> int:
        """Takes the room if the disk has it, whatever the cache's bound. Returns what it lacks: others use it too."""
        size_bytes = fetch.entry.size_bytes
        is_there = _allocated(partial, size_bytes)
        if not is_there and fetch.is_small and self._spare.give(size_bytes):
            is_there = _allocated(partial, size_bytes)
        if is_there:
            return 0
        lacking = size_bytes + _BESIDE_BYTES - self.free_bytes()
        return lacking if lacking > 0 else size_bytes  # of what is free, some may be for others

    @contextlib.contextmanager
    def _deciding(self) -> Iterator[None]:
        """One process at a time makes room."""
        descriptor = os.open(self._folder / "room.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _drop(self, needed_bytes: int, beside: Collection[Digest]) -> int:
        """Bytes that are free now: of quarantined files first, then of what the policy chooses and nobody reads.

        If all of that would not be enough, the latter stays; `beside` does anyway.
        """
        freed = self._sweep(is_short=True)
        for path, size_bytes in self._sizes("quarantine"):
            path.unlink(missing_ok=True)
            freed += size_bytes
        users = self._users() if freed < needed_bytes else {}
        residents = {
            path.name: Resident(
                name=path.name, size_bytes=size, used_s=_used_s(path), models=users.get(Digest(path.name), ())
            )
            for path, size in self._sizes("objects")
            if path.name not in beside
        }
        while freed < needed_bytes:
            chosen = [residents.pop(name) for name in self._evict([*residents.values()], needed_bytes - freed)]
            if sum(int(each.size_bytes) for each in chosen) < needed_bytes - freed:
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
            if not try_lock(descriptor, fcntl.LOCK_EX):
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

    def _sweep(self, *, is_short: bool = False) -> int:
        """Removes what fetches left that were broken off: what is old or of no known use, and all if room is short."""

        def is_useless(path: Path, status: os.stat_result) -> bool:
            return is_short or time.time() - status.st_mtime > _LEFT_S or Digest(path.name) not in self._users()

        return sum(discard(path, functools.partial(is_useless, path)) for path, _ in self._sizes("partial"))

    def _sizes(self, *folders: str) -> list[tuple[Path, int]]:
        found = []
        for folder in folders:
            for path in sorted((self._folder / folder).iterdir()):
                with contextlib.suppress(FileNotFoundError):
                    found.append((path, path.stat().st_size))
        return found


def _allocated(partial: Partial, size_bytes: int) -> bool:
    """Whether it has the room now."""
    with contextlib.suppress(NoRoom), refusing():
        partial.allocate(size_bytes)
        return True
    return False


def _used_s(path: Path) -> float:
    try:
        return path.stat().st_atime
    except FileNotFoundError:
        return 0.0


def _receive(partial: Partial, blocks: Iterator[bytes]) -> None:
    with refusing():
        for block in blocks:
            partial.add(block)
