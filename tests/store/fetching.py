"""A process that fetches one entry of a store: `python -m tests.store.fetching URL CACHE ENTRY`."""

import subprocess
import sys
from pathlib import Path

from darkroom.store.node import NodeStore


def fetcher(url: str, cache: Path, entry_id: str) -> "subprocess.Popen[bytes]":
    """Such a process."""
    command = [sys.executable, "-m", "tests.store.fetching", url, str(cache), entry_id]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    url, cache, entry_id = sys.argv[1:]
    store = NodeStore(url, Path(cache), limit_bytes=1 << 30)
    store.fetch(entry_id, lambda _path: True)
