"""A node whose disk is full: weights stay afar and can be read there, small files come, nothing partial is seen."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from darkroom.errors import StoreUnavailable, UnusableModel
from darkroom.store.indexing import write_index
from darkroom.store.node import NodeStore
from darkroom.store.source import Afar
from tests.store.disks import fill, needs_root, small_disk
from tests.store.files import WEIGHTS, make_store
from tests.store.servers import Cutting, Nginx, needs_nginx, nginx

_MIB = 1 << 20
_WEIGHTS = f"unet/{WEIGHTS}"
pytestmark = needs_nginx


def _all(_path: str) -> bool:
    return True


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Entries of 1 MiB, and one of 3 MiB."""
    make_store(tmp_path / "remote", "one", "two", size_bytes=_MIB)
    make_store(tmp_path / "remote", "big", size_bytes=3 * _MIB)
    write_index(tmp_path / "remote")
    return tmp_path / "remote"


@pytest.fixture
def web(files: Path, tmp_path: Path) -> Iterator[Nginx]:
    with nginx(files, tmp_path / "nginx") as server:
        yield server


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of 4 MiB."""
    with small_disk(tmp_path / "cache", 4 * _MIB):
        yield tmp_path / "cache"


def _node(url: str, cache: Path, limit_bytes: int = 64 * _MIB) -> NodeStore:
    return NodeStore(url, cache, limit_bytes=limit_bytes, refresh_s=0.0)


def _afar(store: NodeStore, entry_id: str) -> Afar:
    """Its weights, which are not here."""
    path = store.root / entry_id / _WEIGHTS
    assert store.weights(path.parent) == [path]
    found = store.locate(path)
    assert isinstance(found, Afar)
    return found


def _check_read(store: NodeStore, files: Path, entry_id: str) -> None:
    content = (files / entry_id / _WEIGHTS).read_bytes()
    afar = _afar(store, entry_id)
    assert b"".join(afar.blocks()) == content
    assert content.startswith(afar.start())
    assert afar.entry.size_bytes == len(content)


def _is_clean(store: NodeStore, cache: Path) -> bool:
    """Whether nothing that is not whole lies anywhere."""
    return not list((cache / "partial").iterdir()) and not [p for p in store.root.rglob(".*") if p.name != ".darkroom"]


@needs_root
def test_weights_that_the_disk_has_no_room_for_are_read_past_it(web: Nginx, files: Path, cache: Path) -> None:
    store = _node(web.url, cache)
    other = fill(cache, but_bytes=3 * _MIB // 2)
    store.fetch("one", _all)
    store.fetch("big", _all)
    assert (store.root / "big" / "model_index.json").exists()
    assert (store.root / "one" / _WEIGHTS).exists(), "it would not have been enough, so it stays"
    assert web.fetch_count(f"big/{_WEIGHTS}") == 0
    assert _is_clean(store, cache)
    _check_read(store, files, "big")
    other.unlink()
    store.fetch("big", _all)
    assert (store.root / "big" / _WEIGHTS).exists()
    assert store.locate(store.root / "big" / _WEIGHTS) == store.root / "big" / _WEIGHTS


@needs_root
def test_nothing_goes_for_what_has_no_room_on_the_disk_even_if_it_had_in_the_cache(
    web: Nginx, files: Path, cache: Path
) -> None:
    """The cache is full, and so is the disk of something else: what would be enough for one is too little for both."""
    make_store(files, "long", size_bytes=9 * _MIB // 4)
    write_index(files)
    store = _node(web.url, cache, limit_bytes=3 * _MIB)
    store.fetch("one", _all)
    fill(cache, but_bytes=_MIB // 2)
    store.fetch("long", _all)
    assert (store.root / "one" / _WEIGHTS).exists()
    assert _is_clean(store, cache)
    _check_read(store, files, "long")


def test_weights_that_stay_afar_leave_the_room_that_is_kept_aside(web: Nginx, tmp_path: Path) -> None:
    store = _node(web.url, tmp_path / "cache", limit_bytes=2 * _MIB)
    spare = tmp_path / "cache" / "spare"
    held_bytes = spare.stat().st_size
    assert held_bytes > 0
    store._objects.give_way()
    for _ in range(2):
        store.fetch("big", _all)
        assert spare.stat().st_size == held_bytes


@needs_root
def test_small_files_come_into_the_room_that_is_kept_aside(web: Nginx, files: Path, cache: Path) -> None:
    store = _node(web.url, cache)
    fill(cache)
    store.fetch("big", _all)
    assert (store.root / "big" / "model_index.json").read_bytes() == (files / "big" / "model_index.json").read_bytes()
    _check_read(store, files, "big")


@needs_root
def test_where_not_even_a_config_fits_that_is_said(web: Nginx, cache: Path) -> None:
    fill(cache)
    store = _node(web.url, cache)
    with pytest.raises(StoreUnavailable, match=r"no room, not even for (model_index|unet/config).json"):
        store.fetch("one", _all)
    assert _is_clean(store, cache)


@needs_root
def test_room_is_made_for_what_fits(web: Nginx, files: Path, cache: Path) -> None:
    store = _node(web.url, cache)
    fill(cache, but_bytes=7 * _MIB // 4)
    store.fetch("one", _all)
    store.fetch("two", _all)
    assert not (store.root / "one" / _WEIGHTS).exists()
    assert (store.root / "two" / _WEIGHTS).read_bytes() == (files / "two" / _WEIGHTS).read_bytes()


def test_what_is_larger_than_the_cache_stays_afar_and_pushes_nothing_out(
    web: Nginx, files: Path, tmp_path: Path
) -> None:
    store = _node(web.url, tmp_path / "cache", limit_bytes=2 * _MIB)
    store.fetch("one", _all)
    store.fetch("big", _all)
    _check_read(store, files, "big")
    assert (store.root / "one" / _WEIGHTS).exists()


def test_files_that_are_wanted_together_do_not_push_each_other_out(web: Nginx, files: Path, tmp_path: Path) -> None:
    (files / "one" / "vae").mkdir()
    (files / "one" / "vae" / WEIGHTS).write_bytes((files / "two" / _WEIGHTS).read_bytes())
    write_index(files)
    store = _node(web.url, tmp_path / "cache", limit_bytes=3 * _MIB // 2)
    for _ in range(3):
        store.fetch("one", _all)
    assert web.fetch_count(WEIGHTS) == 1
    assert [isinstance(store.locate(store.root / "one" / name / WEIGHTS), Afar) for name in ("unet", "vae")].count(
        True
    ) == 1


def test_what_was_dropped_since_it_was_fetched_is_read_all_the_same(web: Nginx, files: Path, tmp_path: Path) -> None:
    store = _node(web.url, tmp_path / "cache")
    store.fetch("one", _all)
    (store.root / "one" / _WEIGHTS).unlink()
    found = store.locate(store.root / "one" / _WEIGHTS)
    assert isinstance(found, Afar)
    assert b"".join(found.blocks()) == (files / "one" / _WEIGHTS).read_bytes()


@pytest.mark.parametrize("change", ["corrupt", "truncated", "longer", "gone"])
def test_what_the_store_has_wrong_is_refused_afar_as_it_is_here(
    change: str, web: Nginx, files: Path, tmp_path: Path
) -> None:
    bad = files / "big" / _WEIGHTS
    content = bad.read_bytes()
    bad.unlink()
    if change != "gone":
        bad.write_bytes({"corrupt": content[:-1] + b"!", "truncated": content[:-1], "longer": content + b"!"}[change])
    store = _node(web.url, tmp_path / "cache", limit_bytes=2 * _MIB)
    store.fetch("big", _all)
    path = store.root / "big" / _WEIGHTS
    kind = StoreUnavailable if change == "gone" else UnusableModel
    for _ in range(3):
        found = store.locate(path)
        assert isinstance(found, Afar)
        with pytest.raises(kind):
            list(found.blocks())
    if change != "gone":
        with pytest.raises(kind):
            store.fetch("big", _all)
        assert web.fetch_count(f"big/{_WEIGHTS}") == 1  # not again and again
    store.fetch("one", _all)


def test_a_connection_that_breaks_past_the_disk_is_made_anew_where_it_broke(
    web: Nginx, files: Path, tmp_path: Path
) -> None:
    make_store(files, "large", size_bytes=20 * _MIB)
    write_index(files)
    proxy = Cutting(web.port, cut_bytes=12 * _MIB)
    store = _node(f"http://127.0.0.1:{proxy.port}", tmp_path / "cache", limit_bytes=2 * _MIB)
    store.fetch("large", _all)
    assert b"".join(_afar(store, "large").blocks()) == (files / "large" / _WEIGHTS).read_bytes()
    proxy.close()
    starts = web.starts(f"large/{_WEIGHTS}")
    assert starts[0] == 0
    assert starts[1] > 7 * _MIB


def test_what_came_past_the_disk_in_pieces_and_is_not_the_file_says_nothing_against_the_store(
    web: Nginx, files: Path, tmp_path: Path
) -> None:
    make_store(files, "large", size_bytes=20 * _MIB)
    write_index(files)
    path = files / "large" / _WEIGHTS
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    proxy = Cutting(web.port, cut_bytes=12 * _MIB)
    store = _node(f"http://127.0.0.1:{proxy.port}", tmp_path / "cache", limit_bytes=2 * _MIB)
    store.fetch("large", _all)
    with pytest.raises(StoreUnavailable, match="not one file"):
        list(_afar(store, "large").blocks())
    proxy.close()


def test_a_header_past_the_disk_costs_its_own_bytes(web: Nginx, tmp_path: Path) -> None:
    store = _node(web.url, tmp_path / "cache", limit_bytes=2 * _MIB)
    store.fetch("big", _all)
    start = _afar(store, "big").start()
    assert len(start) == 8 + int.from_bytes(start[:8], "little")


@needs_root
@pytest.mark.parametrize("has_vocabulary", [False, True])
def test_on_a_disk_with_blocks_folders_find_room_too(
    has_vocabulary: bool,  # noqa: FBT001 - a parameter of the test
    web: Nginx,
    files: Path,
    tmp_path: Path,
) -> None:
    """On tmpfs folders take no room; here each takes a block, even where all files are here under other names."""
    if has_vocabulary:
        (files / "big" / "vocab.txt").write_bytes(bytes(600_000))
        write_index(files)
    image, folder = tmp_path / "image", tmp_path / "ext4"
    image.write_bytes(b"")
    with image.open("r+b") as file:
        file.truncate(64 * _MIB)
    folder.mkdir()
    made = subprocess.run(["mkfs.ext4", "-q", "-m", "0", image], check=False, capture_output=True)
    if made.returncode or subprocess.run(["mount", "-o", "loop", image, folder], check=False).returncode:
        pytest.skip("cannot mount")
    try:
        cache = folder / "cache"
        store = _node(web.url, cache)
        store.fetch("one", _all)
        fill(folder)
        store.fetch("big", _all)
        assert (store.root / "big" / "unet" / "config.json").exists()
        _check_read(store, files, "big")
        assert (store.root / "one" / _WEIGHTS).exists(), "nothing has to go for them"
    finally:
        subprocess.run(["umount", "-l", folder], check=True)
