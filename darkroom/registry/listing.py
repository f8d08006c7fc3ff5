"""Reads what a model store offers, wherever it is."""

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from darkroom.registry.model_store import StoreListing, read_model_store
from darkroom.store.node import NodeStore
from darkroom.store.skeleton import Skeleton
from darkroom.store.source import Source


class Listings:
    """Listings of one store. `close` removes what it keeps on the disk."""

    def __init__(self, source: Source) -> None:
        """A remote store is read by way of a skeleton, in a temporary folder."""
        self._root = source.root
        self._skeleton: Skeleton | None = None
        if isinstance(source, NodeStore):
            self._skeleton = Skeleton(source, Path(tempfile.mkdtemp(prefix="darkroom-skeleton-")) / "store")

    def read(self) -> StoreListing:
        """What the store offers now. Raises OSError or StoreUnavailable if it cannot be read at all."""
        if self._skeleton is None:
            return read_model_store(self._root)
        failed = self._skeleton.refresh()
        listing = read_model_store(self._skeleton.root)
        return replace(listing, refused={**listing.refused, **failed})

    def close(self) -> None:
        """Nothing may be read afterwards."""
        if self._skeleton is not None:
            shutil.rmtree(self._skeleton.root.parent, ignore_errors=True)
