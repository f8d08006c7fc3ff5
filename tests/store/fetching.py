"""A process that fetches one entry of a store: `python -m tests.store.fetching URL CACHE ENTRY`."""

import sys
from pathlib import Path

from darkroom.store.node import NodeStore

if __name__ == "__main__":
    url, cache, entry_id = sys.argv[1:]
    store = NodeStore(url, Path(cache), limit_bytes=1 << 30)
    store.fetch(entry_id, lambda _path: True)
