"""Reads a file into a pool's block past the page cache: O_DIRECT, 2 MiB blocks, several in flight, no second copy.

Where O_DIRECT is not to be had, or the file lies in the page cache anyway, the same blocks are read the ordinary way.
A file is never mapped: one that somebody truncates would kill the process.
"""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from darkroom.models.store.pool import ALIGNMENT, Bytes

BLOCK_BYTES = 2 << 20
IN_FLIGHT = 8
_PROBES = 4


class ShortFile(OSError):
    """The file ends before it should: somebody truncated it."""


def padded_bytes(size_bytes: int) -> int:
    """How large a block must be to read a file of this size into it."""
    return -(-size_bytes // ALIGNMENT) * ALIGNMENT


def read_file(descriptor: int, into: Bytes, size_bytes: int, *, in_flight: int = IN_FLIGHT) -> Iterator[int]:
    """Reads the first `size_bytes` of a file; gives how many of them are there, whenever more are, in order.

    `into` must have `padded_bytes` of room; `in_flight`: blocks asked of the disk at once. Raises OSError; ShortFile if
    the file is shorter.
    """
    offsets = range(0, size_bytes, BLOCK_BYTES)
    with _opened_for(descriptor, size_bytes) as (source, is_direct), _threads(min(in_flight, len(offsets))) as threads:
        work = [
            threads.submit(_read_block, source, into, offset, size_bytes, is_direct=is_direct) for offset in offsets
        ]
        for offset, block in zip(offsets, work, strict=True):
            block.result()
            yield min(offset + BLOCK_BYTES, size_bytes)


@contextlib.contextmanager
def _threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """Threads of this read's own, so that a LoRA never waits for a base model; all gone in the end.

    None may go on to write into memory, or to read from a descriptor, that is another's by then.
    """
    threads = ThreadPoolExecutor(max(count, 1), thread_name_prefix="read")
    try:
        yield threads
    finally:
        threads.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _opened_for(descriptor: int, size_bytes: int) -> Iterator[tuple[int, bool]]:
    """The file opened for O_DIRECT; or as it is, where that is not possible or not worth it."""
    if _is_cached(descriptor, size_bytes):
        yield descriptor, False
        return
    try:
        direct = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError:
        yield descriptor, False
        return
    try:
        yield direct, True
    finally:
        os.close(direct)


def _is_cached(descriptor: int, size_bytes: int) -> bool:
    """Whether the page cache seems to hold the file, by a few pages of it."""
    page = bytearray(ALIGNMENT)
    for offset in {size_bytes * i // _PROBES // ALIGNMENT * ALIGNMENT for i in range(_PROBES)}:
        try:
            if os.preadv(descriptor, [page], offset, os.RWF_NOWAIT) == 0:
                return False
        except OSError:
            return False
    return True


def _read_block(descriptor: int, into: Bytes, start: int, size_bytes: int, *, is_direct: bool) -> None:
    """Fills one block, or what the file has of it."""
    stop = min(start + BLOCK_BYTES, size_bytes)
    while start < stop:
        end = padded_bytes(stop) if is_direct else stop
        try:
            count = os.preadv(descriptor, [into.data[start:end]], start)
        except OSError as error:
            if not (is_direct and error.errno == errno.EINVAL):
                raise
            is_direct = False  # this file system only promises it, or the file ends here
            fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~os.O_DIRECT)
            continue
        if count == 0:
            raise ShortFile(f"the file ends at {start} of {size_bytes} bytes")
        start += count
