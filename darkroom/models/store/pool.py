"""Memory that files are read into: blocks whose pages are there already, given back by themselves and used again.

Page faults cost more than the disk: a fresh 2 GiB is half a million of them. The rule on lifetimes: a block belongs to
whoever holds its array, or a tensor over it, and comes back to the pool when the last of these is gone.
"""

import mmap
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import structlog
from numpy.typing import NDArray

from darkroom.policy.pinning import SizeClass, block_counts, class_for

Bytes = NDArray[np.uint8]
ALIGNMENT = 4096
"""Of addresses, offsets and lengths that O_DIRECT takes, on any disk."""
_HUGE_PAGE_BYTES = 2 << 20
_POPULATE_WRITE = 23
"""MADV_POPULATE_WRITE, of Linux 5.14."""
_LARGEST_WASTE = 4
"""A block that is more times too large than this is left for a larger file."""
Change = Callable[[Bytes], None]
_log = structlog.get_logger()


def _leave(block: Bytes) -> None:
    """Changes nothing: memory for a CPU needs no pinning."""


class HostPool:
    """Blocks of memory. Its methods may be called from any thread."""

    def __init__(self, *, idle_bytes: int, pin: Change = _leave, unpin: Change = _leave) -> None:
        """`idle_bytes`: kept of blocks that nobody uses; `pin` prepares a block for copies to the device."""
        self._idle_bytes, self._pin, self._unpin = idle_bytes, pin, unpin
        self._classes: tuple[SizeClass, ...] = ()
        self._idle: list[mmap.mmap] = []
        self._returned: deque[mmap.mmap] = deque()
        self._lock = threading.Lock()
        self.made_count = 0
        """Blocks made since the start; the others were used again."""

    def prepare(self, classes: Sequence[SizeClass], budget_bytes: int) -> None:
        """Makes blocks of these classes within the budget, all pages there. Later blocks have these sizes too."""
        with self._lock:
            self._classes = tuple(_rounded(chosen) for chosen in classes)
            counts = block_counts(self._classes, min(budget_bytes, self._idle_bytes))
            for chosen, count in zip(self._classes, counts, strict=True):
                self._idle += [self._make(chosen.capacity_bytes) for _ in range(count)]
        _log.info("pool_prepared", block_bytes=[c.capacity_bytes for c in self._classes], block_counts=counts)

    def take(self, size_bytes: int) -> Bytes:
        """A block of at least so many bytes, at an aligned address, and at most so many times as large."""
        size_bytes = -(-max(size_bytes, 1) // ALIGNMENT) * ALIGNMENT
        with self._lock:
            self._collect()
            fitting = [block for block in self._idle if size_bytes <= len(block) <= _LARGEST_WASTE * size_bytes]
            block = min(fitting, key=len, default=None)
            if block is not None:
                self._idle.remove(block)
        if block is None:
            chosen = class_for(size_bytes, self._classes)
            fits = chosen is not None and chosen.capacity_bytes <= _LARGEST_WASTE * size_bytes
            block = self._make(chosen.capacity_bytes if chosen is not None and fits else size_bytes)
        array = np.frombuffer(block, np.uint8)
        weakref.finalize(array, self._returned.append, block)  # on any thread, at any time: takes no lock
        return array

    @property
    def idle_bytes(self) -> int:
        """Of the blocks that nobody uses."""
        with self._lock:
            self._collect()
            return sum(len(block) for block in self._idle)

    def _collect(self) -> None:
        """Takes back what came back, and lets the largest go while too much is idle."""
        while self._returned:
            self._idle.append(self._returned.popleft())
        self._idle.sort(key=len)
        while sum(len(block) for block in self._idle) > self._idle_bytes:
            self._unpin(np.frombuffer(self._idle.pop(), np.uint8))

    def _make(self, size_bytes: int) -> mmap.mmap:
        block = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if size_bytes >= _HUGE_PAGE_BYTES:
            _advise(block, mmap.MADV_HUGEPAGE)
        _advise(block, _POPULATE_WRITE)
        self._pin(np.frombuffer(block, np.uint8))
        self.made_count += 1
        return block


def available_bytes() -> int:
    """Of memory, what can still be had: no more than the machine has, whatever this process is allowed."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) << 10
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _advise(block: mmap.mmap, advice: Any) -> None:
    """Advice only: a kernel that does not know it makes the pages later, or small ones."""
    try:
        block.madvise(advice)
    except OSError:
        return


def _rounded(chosen: SizeClass) -> SizeClass:
    return SizeClass(-(-chosen.capacity_bytes // ALIGNMENT) * ALIGNMENT, chosen.weight)
