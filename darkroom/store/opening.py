"""What `--model-store` says, as a store: a folder's path, or the URL of one that was indexed."""

from pathlib import Path

from darkroom.store.evicting import Eviction
from darkroom.store.folder import Folder
from darkroom.store.node import NodeStore
from darkroom.store.remote import check_url
from darkroom.store.source import Source

DEFAULT_CACHE = Path("~/.cache/darkroom/models")
DEFAULT_CACHE_BYTES = 64 << 30


def is_url(where: str | Path) -> bool:
    """Whether it is a URL, and not a folder's path."""
    return "://" in str(where)


def check_store(where: str | Path) -> None:
    """Raises ValueError unless it can be a store."""
    if is_url(where):
        check_url(str(where))
    elif not Path(where).is_dir():
        raise ValueError(f"model_store must be a folder or a URL, and {where} is none")


def absolute(where: str | Path) -> str:
    """The same store for processes with other working folders."""
    return str(where) if is_url(where) else str(Path(where).resolve())


def open_source(where: str | Path, cache: Path, cache_bytes: int, *, eviction: Eviction | None = None) -> Source:
    """The store's files; those of a URL by way of `cache`, a folder that other processes of the node use too."""
    if is_url(where):
        return NodeStore(str(where), cache.expanduser(), limit_bytes=cache_bytes, eviction=eviction)
    return Folder(Path(where))
