"""What leaves a node's disk when room is needed: the files of the entries that this process hears least of."""

import os
import shutil
from pathlib import Path

import pytest

from darkroom.store.evicting import Eviction
from darkroom.store.indexing import write_index
from darkroom.store.node import NodeStore
from darkroom.store.source import Afar
from tests.store.files import WEIGHTS, make_store

_ROOM_BYTES = 320_000
"""For three of the entries."""


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Entries of 100 kB each; "twin" has the weights of "a" under another name."""
    root = tmp_path / "remote"
    make_store(root, *"abcde", size_bytes=100_000)
    shutil.copytree(root / "a", root / "twin")
    (root / "twin" / "model_index.json").write_text('{"_class_name": "Z"}')
    write_index(root)
    return root


def _node(files: Path, tmp_path: Path, eviction: Eviction | None = None) -> NodeStore:
    return NodeStore(f"file://{files}", tmp_path / "cache", limit_bytes=_ROOM_BYTES, refresh_s=0.0, eviction=eviction)


def _fetch(store: NodeStore, *entry_ids: str) -> None:
    """Each used a second after the one before, long ago."""
    for number, entry_id in enumerate(entry_ids):
        store.fetch(entry_id, lambda _path: True)
        for path in (store.root / entry_id).rglob("*"):
            if path.is_file():
                os.utime(path, ns=(number * 10**9, path.stat().st_mtime_ns))


def _held(store: NodeStore) -> list[str]:
    return [path.parent.parent.name for path in sorted(store.root.glob(f"*/unet/{WEIGHTS}"))]


def _asked(**counts: int) -> Eviction:
    eviction = Eviction()
    for entry_id, count in counts.items():
        for _ in range(count):
            eviction.ran({entry_id}, 1.0)
    return eviction


def test_the_entry_asked_for_least_leaves_whenever_it_was_used(files: Path, tmp_path: Path) -> None:
    store = _node(files, tmp_path, _asked(a=5, b=2, c=1))
    _fetch(store, *"abcd")
    assert _held(store) == ["a", "b", "d"]


def test_what_other_processes_brought_here_counts_by_the_manifests_that_they_left(files: Path, tmp_path: Path) -> None:
    _fetch(_node(files, tmp_path), *"abc")
    store = _node(files, tmp_path, _asked(a=5, c=1))
    _fetch(store, "d")
    assert _held(store) == ["a", "c", "d"]


def test_a_file_that_entries_share_outlives_those_that_they_do_not(files: Path, tmp_path: Path) -> None:
    store = _node(files, tmp_path, _asked(a=1, twin=1, b=1, c=1))
    _fetch(store, "a", "twin", "b", "c", "d")
    assert _held(store) == ["a", "c", "d", "twin"]


def test_pinned_entries_stay_and_what_only_they_could_make_room_for_stays_afar(files: Path, tmp_path: Path) -> None:
    eviction = Eviction()
    eviction.pin({"a", "c"})
    store = _node(files, tmp_path, eviction)
    _fetch(store, *"abcd")
    assert _held(store) == ["a", "c", "d"]
    eviction.pin({"a", "c", "d"})
    _fetch(store, "e")
    assert _held(store) == ["a", "c", "d"]
    assert isinstance(store.locate(store.root / "e" / "unet" / WEIGHTS), Afar)
    eviction.pin(())
    _fetch(store, "e")
    assert "e" in _held(store)
