"""The remote and SSD tiers over real servers: what comes is verified, shared, bounded, and survives faults."""

import contextlib
import fcntl
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from darkroom.errors import ModelNotFound, StoreUnavailable, UnusableModel
from darkroom.registry.model_store import read_model_store
from darkroom.store.indexing import write_index
from darkroom.store.manifest import INDEX_PATH, digest_of
from darkroom.store.node import NodeStore
from darkroom.store.skeleton import Skeleton
from tests.registry.test_model_store import make_model
from tests.store.fetching import fetcher
from tests.store.files import WEIGHTS, make_store, safetensors
from tests.store.servers import Nginx, fill_bucket, needs_nginx, nginx, s3_server

_MIB = 1 << 20
pytestmark = needs_nginx


def _all(_path: str) -> bool:
    return True


def _node(url: str, tmp_path: Path, limit_bytes: int = 64 * _MIB) -> NodeStore:
    return NodeStore(url, tmp_path / "cache", limit_bytes=limit_bytes, refresh_s=0.0)


def _objects(tmp_path: Path, folder: str = "objects") -> list[Path]:
    return sorted((tmp_path / "cache" / folder).iterdir())


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A store of two entries, with its index."""
    make_store(tmp_path / "remote", "one", "two")
    write_index(tmp_path / "remote")
    return tmp_path / "remote"


@pytest.fixture
def web(files: Path, tmp_path: Path) -> Iterator[Nginx]:
    with nginx(files, tmp_path / "nginx") as server:
        yield server


def _same(store: NodeStore, files: Path, entry_id: str) -> bool:
    paths = [path for path in (files / entry_id).rglob("*") if path.is_file()]
    return all((store.root / path.relative_to(files)).read_bytes() == path.read_bytes() for path in paths)


def test_an_entry_comes_from_nginx_once(web: Nginx, files: Path, tmp_path: Path) -> None:
    store = _node(web.url, tmp_path)
    store.fetch("one", _all)
    assert _same(store, files, "one")
    _node(web.url, tmp_path).fetch("one", _all)
    assert web.fetch_count(WEIGHTS) == 1
    entry = store.expected(store.root / "one" / "unet" / WEIGHTS)
    assert entry is not None
    assert entry.digest == digest_of((files / "one" / "unet" / WEIGHTS).read_bytes())


def test_an_entry_comes_from_a_folder(files: Path, tmp_path: Path) -> None:
    store = _node(f"file://{files}", tmp_path)
    store.fetch("one", _all)
    assert _same(store, files, "one")


def test_an_entry_comes_from_s3(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with s3_server() as address:
        client = fill_bucket(address, files, monkeypatch)
        store = _node("s3://models/store", tmp_path)
        store.fetch("one", _all)
        assert _same(store, files, "one")
        client.delete_object(Bucket="models", Key=f"store/two/unet/{WEIGHTS}")
        with pytest.raises(StoreUnavailable, match="lacks a file"):
            store.fetch("two", _all)
    with pytest.raises(StoreUnavailable, match="does not answer"):
        _node("s3://models/store", tmp_path / "other").fetch("one", _all)


def test_only_what_is_wanted_comes(web: Nginx, tmp_path: Path) -> None:
    store = _node(web.url, tmp_path)
    store.fetch("one", lambda path: path.endswith(".json"))
    assert web.fetch_count(WEIGHTS) == 0
    assert (store.root / "one" / "model_index.json").exists()


def test_entries_share_equal_files(files: Path, tmp_path: Path) -> None:
    (files / "two" / "unet" / WEIGHTS).write_bytes((files / "one" / "unet" / WEIGHTS).read_bytes())
    write_index(files)
    with nginx(files, tmp_path / "nginx") as web:
        store = _node(web.url, tmp_path)
        store.fetch("one", _all)
        store.fetch("two", _all)
        assert web.fetch_count(WEIGHTS) == 1
    assert (store.root / "one" / "unet" / WEIGHTS).samefile(store.root / "two" / "unet" / WEIGHTS)


def test_an_unknown_entry_is_not_found(web: Nginx, tmp_path: Path) -> None:
    for entry_id in ("three", "../one", ".darkroom", ""):
        with pytest.raises(ModelNotFound):
            _node(web.url, tmp_path).fetch(entry_id, _all)


@pytest.mark.parametrize("change", ["corrupt", "truncated", "longer", "swapped", "gone"])
def test_what_is_not_as_promised_is_refused_and_others_serve(
    change: str, web: Nginx, files: Path, tmp_path: Path
) -> None:
    bad, good = files / "one" / "unet" / WEIGHTS, files / "two" / "unet" / WEIGHTS
    content = bad.read_bytes()
    bad.unlink()
    if change != "gone":
        bad.write_bytes(
            {
                "corrupt": content[:-1] + b"!",
                "truncated": content[:-1],
                "longer": content + b"!",
                "swapped": good.read_bytes(),
            }[change]
        )
    store = _node(web.url, tmp_path)
    for _ in range(3):
        with pytest.raises(StoreUnavailable if change == "gone" else UnusableModel):
            store.fetch("one", _all)
    assert not (store.root / "one" / "unet" / WEIGHTS).exists()
    assert _objects(tmp_path, "partial") == []
    assert change == "gone" or web.fetch_count(f"one/unet/{WEIGHTS}") == 1  # not again and again
    kept = [file.read_bytes() for file in _objects(tmp_path, "quarantine")]
    assert kept == ([bad.read_bytes()] if change in ("corrupt", "truncated", "swapped") else [])
    store.fetch("two", _all)
    assert _same(store, files, "two")


def test_a_file_that_goes_bad_on_the_disk_is_quarantined_and_fetched_again(
    web: Nginx, files: Path, tmp_path: Path
) -> None:
    store = _node(web.url, tmp_path)
    store.fetch("one", _all)
    path = store.root / "one" / "unet" / WEIGHTS
    path.chmod(0o644)
    path.write_bytes(b"bad")
    store.refuse(path, "it is bad")  # as whoever reads it does
    assert not path.exists()
    assert [file.read_bytes() for file in _objects(tmp_path, "quarantine")] == [b"bad"]
    store.fetch("one", _all)
    assert _same(store, files, "one")


def test_a_file_that_another_has_fetched_again_is_not_quarantined(web: Nginx, files: Path, tmp_path: Path) -> None:
    store = _node(web.url, tmp_path)
    store.fetch("one", _all)
    path = store.root / "one" / "unet" / WEIGHTS
    path.chmod(0o644)
    path.write_bytes(b"bad")
    for _ in range(2):  # two processes have read the bad one, and one of them has mended it before the other says so
        assert store.refuse(path, "it is bad")
        store.fetch("one", _all)
    assert web.fetch_count(f"one/unet/{WEIGHTS}") == 2
    assert [file.read_bytes() for file in _objects(tmp_path, "quarantine")] == [b"bad"]


def test_a_config_that_goes_bad_on_the_disk_is_fetched_again(web: Nginx, files: Path, tmp_path: Path) -> None:
    store = _node(web.url, tmp_path)
    store.fetch("one", _all)
    path = store.root / "one" / "model_index.json"
    path.chmod(0o644)
    path.write_bytes(b"{}")
    store.fetch("one", _all)
    assert _same(store, files, "one")


def test_a_new_index_brings_new_files_and_removes_old_names(web: Nginx, files: Path, tmp_path: Path) -> None:
    store = _node(web.url, tmp_path)
    store.fetch("one", _all)
    (files / "one" / "unet" / WEIGHTS).write_bytes(safetensors(b"new" * 500))
    (files / "one" / "unet" / "config.json").unlink()
    write_index(files)
    store.fetch("one", lambda path: path.endswith(".json"))
    assert not (store.root / "one" / "unet" / WEIGHTS).exists()
    assert not (store.root / "one" / "unet" / "config.json").exists()
    store.fetch("one", _all)
    assert _same(store, files, "one")


def test_with_the_store_down_what_is_here_still_serves(web: Nginx, files: Path, tmp_path: Path) -> None:
    _node(web.url, tmp_path).fetch("one", _all)
    web.stop()
    store = _node(web.url, tmp_path)  # started anew
    store.fetch("one", _all)
    assert _same(store, files, "one")
    with pytest.raises(StoreUnavailable, match="does not answer"):
        store.fetch("two", _all)


def test_a_store_that_hangs_costs_a_bounded_wait(web: Nginx, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("darkroom.store.remote._READ_TIMEOUT_S", 0.5)
    with web.stopped():
        start_s = time.monotonic()
        with pytest.raises(StoreUnavailable, match="does not answer"):
            _node(web.url, tmp_path).fetch("one", _all)
        assert time.monotonic() - start_s < 5


def test_a_store_that_hangs_is_waited_for_once_where_an_older_index_is_known(web: Nginx, tmp_path: Path) -> None:
    store = NodeStore(web.url, tmp_path / "cache", limit_bytes=1 << 30, refresh_s=0.0)
    known = store.entries()
    with web.stopped():
        start_s = time.monotonic()
        assert [store.entries() for _ in range(4)] == [known] * 4
        assert time.monotonic() - start_s < 2


def test_a_store_that_drips_is_given_up(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("darkroom.store.remote._READ_TIMEOUT_S", 3.0)
    monkeypatch.setattr("darkroom.store.remote._CONNECT_TIMEOUT_S", 0.0)
    make_store(files, "big", size_bytes=_MIB)
    write_index(files)
    with nginx(files, tmp_path / "nginx", inside="limit_rate 20k;") as slow:
        start_s = time.monotonic()
        with pytest.raises(StoreUnavailable, match="slow"):
            _node(slow.url, tmp_path).fetch("big", _all)
        assert time.monotonic() - start_s < 10


def test_a_redirect_is_not_followed(web: Nginx, files: Path, tmp_path: Path) -> None:
    redirect = f"return 302 {web.url}$request_uri;"
    with nginx(files, tmp_path / "other", inside=redirect) as elsewhere, pytest.raises(StoreUnavailable):
        _node(elsewhere.url, tmp_path).fetch("one", _all)
    assert web.access_log.read_text() == ""


@pytest.mark.parametrize(
    "text", [b"", b"{}", b"[" * 100_000, b'{"format":1,"entries":{"../x":"0"}}', b"x" * (5 * _MIB)]
)
def test_a_bad_index_is_refused_and_the_last_good_one_serves(
    text: bytes, web: Nginx, files: Path, tmp_path: Path
) -> None:
    good = (files / INDEX_PATH).read_bytes()
    (files / INDEX_PATH).write_bytes(text)
    store = _node(web.url, tmp_path)
    with pytest.raises(StoreUnavailable, match="malformed"):
        store.fetch("one", _all)
    (files / INDEX_PATH).write_bytes(good)
    store.fetch("one", _all)
    (files / INDEX_PATH).write_bytes(text)
    store.fetch("two", _all)
    assert _same(store, files, "two")


def test_a_swapped_manifest_is_refused(web: Nginx, files: Path, tmp_path: Path) -> None:
    manifests = sorted((files / ".darkroom" / "manifests").iterdir())
    manifests[0].write_bytes(manifests[1].read_bytes())
    outcomes = []
    for entry_id in ("one", "two"):
        with contextlib.suppress(UnusableModel):
            _node(web.url, tmp_path).fetch(entry_id, _all)
            outcomes.append(entry_id)
    assert len(outcomes) == 1


def test_the_cache_stays_within_its_bound_and_drops_what_was_used_longest_ago(tmp_path: Path) -> None:
    files = tmp_path / "remote"
    make_store(files, *"abcd", size_bytes=100_000)
    write_index(files)
    store = _node(f"file://{files}", tmp_path, limit_bytes=320_000)
    for number, entry_id in enumerate("abcabd"):
        store.fetch(entry_id, _all)
        for path in (store.root / entry_id).rglob("*"):  # times of their own, whatever the clock's grain
            if path.is_file():
                os.utime(path, (number, number))
    held = sum(path.stat().st_size for path in _objects(tmp_path))
    assert held <= 320_000
    assert [name for name in "abcd" if (store.root / name / "unet" / WEIGHTS).exists()] == ["a", "b", "d"]
    store.fetch("c", _all)
    assert _same(store, files, "c")


def test_a_hundred_requests_in_several_processes_are_one_fetch(files: Path, tmp_path: Path) -> None:
    make_store(files, "big", size_bytes=2 * _MIB)
    write_index(files)
    with nginx(files, tmp_path / "nginx", inside="limit_rate 1m;") as web, contextlib.ExitStack() as started:
        processes = [started.enter_context(fetcher(web.url, tmp_path / "cache", "big")) for _ in range(3)]
        store = _node(web.url, tmp_path)
        with ThreadPoolExecutor(97) as pool:
            for done in [pool.submit(store.fetch, "big", _all) for _ in range(97)]:
                done.result(timeout=60)
        assert [process.wait(60) for process in processes] == [0, 0, 0]
        assert web.fetch_count(WEIGHTS) == 1
    assert _same(store, files, "big")


def test_a_file_that_is_being_read_is_not_dropped(files: Path, tmp_path: Path) -> None:
    store = _node(f"file://{files}", tmp_path, limit_bytes=7_000)
    store.fetch("one", _all)
    with (store.root / "one" / "unet" / WEIGHTS).open("rb") as read:
        fcntl.flock(read, fcntl.LOCK_SH)
        make_store(files, "big", size_bytes=5_000)
        write_index(files)
        store.fetch("big", _all)
        assert (store.root / "one" / "unet" / WEIGHTS).exists()
        assert not (store.root / "big" / "unet" / WEIGHTS).exists()
    store.fetch("big", _all)
    assert _same(store, files, "big")


def test_a_skeleton_gives_the_catalogue_that_the_folder_gives(tmp_path: Path) -> None:
    before = threading.active_count()
    files = tmp_path / "remote"
    make_model(files)
    make_model(files, "broken")
    (files / "broken" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    for name in ("sd", "broken"):
        for path in (files / name).rglob("*.safetensors"):
            path.write_bytes(safetensors(bytes(5000)))
    (files / "ink").mkdir()
    save_file({"unet.x.lora_A.weight": np.zeros((2, 3), np.float32)}, files / "ink" / "ink.safetensors")
    write_index(files)
    with nginx(files, tmp_path / "nginx") as web:
        skeleton = Skeleton(_node(web.url, tmp_path), tmp_path / "skeleton")
        assert skeleton.refresh() == {}
        assert read_model_store(skeleton.root) == read_model_store(files)
        assert web.fetch_count("diffusion_pytorch_model.safetensors") == 0
        (files / "ink" / "ink.safetensors").unlink()
        write_index(files)
        assert skeleton.refresh() == {}
        assert read_model_store(skeleton.root) == read_model_store(files)
        web.stop()
        assert skeleton.refresh() == {}
        assert read_model_store(skeleton.root) == read_model_store(files)
    assert threading.active_count() < before + 20  # however many files
