"""Room kept aside on the disk for small files: without its configs no model can be understood, wherever its weights go.

The rule: who fills it or takes from it has the lock under which room is made.
"""

import contextlib
import os
from pathlib import Path

_MOST_BYTES = 32 << 20
"""Configs and tokenizers of some twenty large models."""
_LARGEST_SHARE = 64
"""Of the cache's bound, and of the disk: at most one part in so many."""
_GRAIN_BYTES = 64 << 10
"""What is given besides: names and folders take blocks too."""


class Spare:
    """The room: a file that takes it until it is needed."""

    def __init__(self, path: Path, limit_bytes: int) -> None:
        """`limit_bytes`: of the cache that it is part of."""
        self._path = path
        disk = os.statvfs(path.parent)
        whole_bytes = min(limit_bytes, disk.f_blocks * disk.f_frsize)
        self.most_bytes = min(_MOST_BYTES, whole_bytes // _LARGEST_SHARE)
        """How large it is when it is full."""

    def fill(self) -> None:
        """Takes what it lacks, if the disk has it."""
        with contextlib.suppress(OSError), self._path.open("ab") as file:
            held = file.tell()
            if held < self.most_bytes:
                try:
                    os.posix_fallocate(file.fileno(), held, self.most_bytes - held)
                except OSError:
                    file.truncate(held)

    def give(self, size_bytes: int) -> bool:
        """Makes so much room on the disk, and some for names. Returns whether it could."""
        with contextlib.suppress(OSError), self._path.open("r+b") as file:
            held = os.fstat(file.fileno()).st_size
            if size_bytes <= held:
                file.truncate(max(held - size_bytes - _GRAIN_BYTES, 0))
                return True
        return False
