"""What the tiers above ask of the files of a model store, whether they lie in a folder here or come from elsewhere."""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from darkroom.store.manifest import WEIGHTS_SUFFIX, FileEntry, is_weights

Wanted = Callable[[str], bool]
"""Whether a file is wanted, by its path in its entry."""


def is_small(path: str) -> bool:
    """Wanted: all but weights."""
    return not is_weights(path)


def weights_in(folder: Path) -> list[Path]:
    """The weights files that lie in a folder, by name."""
    return sorted(path for path in folder.glob(f"*{WEIGHTS_SUFFIX}") if path.is_file())


@dataclass(frozen=True, slots=True)
class Afar:
    """A weights file that is not on this node's disk, as the store has it."""

    entry: FileEntry
    blocks: Callable[[], Generator[bytes, None, None]]
    """All of it: verified, once the last block has come. Raises UnusableModel or StoreUnavailable."""
    start: Callable[[], bytes]
    """Its first bytes up to the end of its header, not verified. Raises StoreUnavailable."""


class Source(Protocol):
    """Files of a model store. Its methods block, and may be called from any thread."""

    @property
    def root(self) -> Path:
        """The folder in which an entry's files lie once they are fetched, in a folder of the entry's id."""

    def fetch(self, entry_id: str, wanted: Wanted) -> None:
        """Brings the wanted files of an entry here. Weights for which there is no room stay afar, and can be read.

        Raises ModelNotFound, UnusableModel for files that are not what the store promises, or StoreUnavailable.
        """

    def weights(self, folder: Path) -> list[Path]:
        """The weights files in a folder below `root`, by name: those that lie there, and those that `fetch` was for."""

    def adapter_weights(self, entry_id: str) -> list[Path]:
        """The weights files of an entry that lie in none of its folders, whether they are here or not.

        Raises ModelNotFound, UnusableModel or StoreUnavailable.
        """

    def locate(self, path: Path) -> Path | Afar:
        """Where to read a weights file: the path if it lies there, or if nobody knows of it."""

    def weights_sizes(self) -> dict[int, float]:
        """How many weights files there are of each size, as far as can be said. Raises nothing."""

    def expected(self, path: Path) -> FileEntry | None:
        """What a file below `root` must be; None where nobody promised anything."""

    def refuse(self, found: Path | Afar, problem: str) -> bool:
        """Takes a file that is not as it must be out of use. Returns whether another can be fetched."""
