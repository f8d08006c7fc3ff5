"""Disks that are soon full: file systems of a few megabytes."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

needs_root = pytest.mark.skipif(os.getuid() != 0, reason="mounts a file system")


@contextlib.contextmanager
def small_disk(folder: Path, size_bytes: int) -> Iterator[None]:
    """A file system of this size at `folder`; skips the test where none can be mounted."""
    folder.mkdir(parents=True, exist_ok=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", folder], check=False).returncode:
        pytest.skip("cannot mount")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def fill(folder: Path, *, but_bytes: int = 0) -> Path:
    """Somebody else's file that takes all of the disk, but for so much."""
    path, status = folder / "somebody-else", os.statvfs(folder)
    step_bytes = left_bytes = status.f_bavail * status.f_frsize - but_bytes
    with path.open("ab") as file:
        while left_bytes > 0 and step_bytes > 0:
            try:
                os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, min(step_bytes, left_bytes))
                left_bytes -= step_bytes
            except OSError:  # some of it is for the file system itself
                step_bytes //= 2
    return path
