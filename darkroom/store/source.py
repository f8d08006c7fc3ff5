"""What the tiers above ask of the files of a model store, whether they lie in a folder here or come from elsewhere."""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from darkroom.store.manifest import FileEntry, is_weights

Wanted = Callable[[str], bool]
"""Whether a file is wanted, by its path in its entry."""


def is_small(path: str) -> bool:
    """Wanted: all but weights."""
    return not is_weights(path)


class Source(Protocol):
    """Files of a model store. Its methods block, and may be called from any thread."""

    @property
    def root(self) -> Path:
        """The folder in which an entry's files lie once they are fetched, in a folder of the entry's id."""

    def fetch(self, entry_id: str, wanted: Wanted) -> None:
        """Brings the wanted files of an entry here.

        Raises ModelNotFound, UnusableModel for files that are not what the store promises, or StoreUnavailable.
        """

    def weights_sizes(self) -> dict[int, float]:
        """How many weights files there are of each size, as far as can be said. Raises nothing."""

    def expected(self, path: Path) -> FileEntry | None:
        """What a file below `root` must be; None where nobody promised anything."""

    def refuse(self, path: Path) -> bool:
        """Takes a file that is not as expected out of use. Returns whether another can be fetched."""
