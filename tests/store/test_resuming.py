"""What has come of a file is not fetched again: connections that break, processes that die, servers of all kinds."""

import itertools
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from darkroom.errors import StoreUnavailable, UnusableModel
from darkroom.store.indexing import write_index
from darkroom.store.manifest import Digest, digest_of
from darkroom.store.node import NodeStore
from darkroom.store.partial import taken
from tests.store.fetching import fetcher
from tests.store.files import WEIGHTS, make_store
from tests.store.servers import Cutting, Nginx, fill_bucket, needs_nginx, nginx, s3_server

_MIB = 1 << 20
_PATH = f"big/unet/{WEIGHTS}"
pytestmark = needs_nginx


def _all(_path: str) -> bool:
    return True


def _node(url: str, tmp_path: Path, limit_bytes: int = 64 * _MIB) -> NodeStore:
    return NodeStore(url, tmp_path / "cache", limit_bytes=limit_bytes, refresh_s=0.0)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A store with an entry of 4 MiB, and a small one."""
    make_store(tmp_path / "remote", "big", size_bytes=4 * _MIB)
    make_store(tmp_path / "remote", "small")
    write_index(tmp_path / "remote")
    return tmp_path / "remote"


@pytest.fixture
def web(files: Path, tmp_path: Path) -> Iterator[Nginx]:
    with nginx(files, tmp_path / "nginx") as server:
        yield server


def _digest(files: Path) -> Digest:
    return digest_of((files / _PATH).read_bytes())


def _leave(files: Path, tmp_path: Path, content: bytes) -> Path:
    """What a fetch leaves that was broken off when this much had come."""
    path = tmp_path / "cache" / "partial" / _digest(files)
    path.parent.mkdir(parents=True, exist_ok=True)
    with taken(path) as partial:
        assert partial is not None
        partial.allocate((files / _PATH).stat().st_size)
        partial.resume()
        partial.add(content)
    assert path.exists()
    return path


def _partials(tmp_path: Path) -> list[str]:
    return [path.name for path in (tmp_path / "cache" / "partial").iterdir()]


def _check_whole(store: NodeStore, files: Path, tmp_path: Path) -> None:
    assert (store.root / _PATH).read_bytes() == (files / _PATH).read_bytes()
    assert (store.root / _PATH).stat().st_mode & 0o222 == 0
    assert _partials(tmp_path) == []


def test_a_connection_that_breaks_is_made_anew_where_it_broke(web: Nginx, files: Path, tmp_path: Path) -> None:
    make_store(files, "large", size_bytes=32 * _MIB)
    write_index(files)
    proxy = Cutting(web.port, cut_bytes=12 * _MIB)
    store = _node(f"http://127.0.0.1:{proxy.port}", tmp_path)
    store.fetch("large", _all)
    proxy.close()
    path = f"large/unet/{WEIGHTS}"
    assert (store.root / path).read_bytes() == (files / path).read_bytes()
    starts = web.starts(path)
    assert starts[0] == 0
    assert 3 <= len(starts) <= 5
    assert all(later - earlier > 7 * _MIB for earlier, later in itertools.pairwise(starts))  # 4 are in buffers


def test_a_store_that_goes_away_is_given_up_and_what_has_come_stays(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("darkroom.store.remote._PAUSES_S", (0.01, 0.01))
    with nginx(files, tmp_path / "slow", inside="limit_rate 1m;") as slow:
        store = _node(slow.url, tmp_path)
        store.fetch("small", _all)
        stopping = threading.Timer(1.5, slow.stop)
        stopping.start()
        with pytest.raises(StoreUnavailable, match="does not answer"):
            store.fetch("big", _all)
        stopping.join()
        assert not (store.root / _PATH).exists()
        assert _partials(tmp_path) == [_digest(files)]
    with nginx(files, tmp_path / "fast", port=slow.port) as fast:
        store.fetch("big", _all)
        _check_whole(store, files, tmp_path)
        (start,) = fast.starts(_PATH)
        assert start >= _MIB


def test_what_a_killed_process_has_fetched_another_goes_on_with(files: Path, tmp_path: Path) -> None:
    with nginx(files, tmp_path / "slow", inside="limit_rate 1m;") as slow:
        process = fetcher(slow.url, tmp_path / "cache", "big")
        deadline_s = time.monotonic() + 30
        while not (partials := list((tmp_path / "cache").glob(f"partial/{_digest(files)}"))) or not _noted(partials[0]):
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        time.sleep(1.0)
        process.kill()
        process.wait()
        store = _node(slow.url, tmp_path)
        assert not list(store.root.rglob(WEIGHTS))
        assert not (tmp_path / "cache" / "objects" / _digest(files)).exists()
        store.fetch("small", _all)  # what may still be of use stays
        assert _partials(tmp_path) == [_digest(files)]
    with nginx(files, tmp_path / "fast", port=slow.port) as fast:
        start_s = time.monotonic()
        store.fetch("big", _all)
        assert time.monotonic() - start_s < 5  # no lock was waited for
        _check_whole(store, files, tmp_path)
        (start,) = fast.starts(_PATH)
        assert start >= _MIB // 2


def _noted(path: Path) -> bool:
    """Whether anything has come."""
    return path.read_bytes()[-8:] != bytes(8)


def test_a_server_without_ranges_sends_it_all_and_what_is_there_is_passed_over(files: Path, tmp_path: Path) -> None:
    _leave(files, tmp_path, (files / _PATH).read_bytes()[: 3 * _MIB])
    with nginx(files, tmp_path / "nginx", inside="max_ranges 0;") as web:
        store = _node(web.url, tmp_path)
        store.fetch("big", _all)
        assert web.starts(_PATH) == [3 * _MIB]
        assert " 206 " not in web.access_log.read_text()
    _check_whole(store, files, tmp_path)


def test_s3_is_asked_for_the_rest_only(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = (files / _PATH).read_bytes()
    with s3_server() as address:
        fill_bucket(address, files, monkeypatch)
        proxy = Cutting(int(address.rpartition(":")[2]))
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{proxy.port}")
        _leave(files, tmp_path, content[: 3 * _MIB])
        store = _node("s3://models/store", tmp_path)
        store.fetch("big", _all)
        proxy.close()
    _check_whole(store, files, tmp_path)
    assert proxy.sent_bytes < 2 * _MIB


@pytest.mark.parametrize("how", ["wrong bytes", "all there", "all there and wrong", "too much noted", "another size"])
def test_what_was_left_counts_for_nothing_unless_it_is_right(how: str, web: Nginx, files: Path, tmp_path: Path) -> None:
    content = (files / _PATH).read_bytes()
    path = _leave(files, tmp_path, content if how.startswith("all there") else content[: 2 * _MIB])
    if how == "another size":
        os.truncate(path, len(content))  # as earlier versions left it
    elif how != "all there":
        with path.open("r+b") as file:
            file.seek(-1 if how == "too much noted" else _MIB, 2 if how == "too much noted" else 0)
            file.write(b"\xff")
    store = _node(web.url, tmp_path)
    store.fetch("big", _all)
    _check_whole(store, files, tmp_path)
    asked = {"wrong bytes": [2 * _MIB, 0], "all there": [], "all there and wrong": [0]}
    assert web.starts(_PATH) == asked.get(how, [0])


def test_a_store_whose_file_has_become_another_is_found_out_and_asked_once_more(
    web: Nginx, files: Path, tmp_path: Path
) -> None:
    content = (files / _PATH).read_bytes()
    _leave(files, tmp_path, content[: 2 * _MIB])
    (files / _PATH).write_bytes(content[:_MIB])  # shorter than what is here
    store = _node(web.url, tmp_path)
    with pytest.raises(UnusableModel, match="not what its manifest says"):
        store.fetch("big", _all)
    assert web.starts(_PATH) == [2 * _MIB, 0]
    assert _partials(tmp_path) == []


def test_what_was_left_goes_when_it_is_old_or_nobody_knows_what_it_was(files: Path, tmp_path: Path) -> None:
    content = (files / _PATH).read_bytes()
    path = _leave(files, tmp_path, content[:_MIB])
    strange = path.with_name("0" * 64)
    strange.write_bytes(bytes(100))
    store = _node(f"file://{files}", tmp_path)
    store.manifest("big")
    store.fetch("small", _all)
    assert _partials(tmp_path) == [path.name]
    (tmp_path / "cache" / "objects" / digest_of((files / "small" / "unet" / WEIGHTS).read_bytes())).unlink()
    os.utime(path, (time.time() - 3601, time.time() - 3601))
    store.fetch("small", _all)
    assert _partials(tmp_path) == []


def test_what_was_left_makes_room(files: Path, tmp_path: Path) -> None:
    make_store(files, "other", size_bytes=3 * _MIB)
    write_index(files)
    _leave(files, tmp_path, (files / _PATH).read_bytes()[:_MIB])
    store = _node(f"file://{files}", tmp_path, limit_bytes=5 * _MIB)
    store.fetch("other", _all)
    assert (store.root / "other" / "unet" / WEIGHTS).exists()
    assert _partials(tmp_path) == []
