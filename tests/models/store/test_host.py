"""The pool, the direct reader and the host tier over real files."""

import gc
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from darkroom.models.store import direct_read
from darkroom.models.store.direct_read import BLOCK_BYTES, ShortFile, padded_bytes, read_file
from darkroom.models.store.host import Corrupt, HostCache
from darkroom.models.store.model_store import ModelStore
from darkroom.models.store.pool import ALIGNMENT, HostPool
from darkroom.policy.pinning import SizeClass
from darkroom.store.evicting import Eviction
from darkroom.store.folder import Folder
from darkroom.store.indexing import write_index
from darkroom.store.manifest import FileEntry, digest_of

_MIB = 1 << 20


def _drop_cache(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def _cache(limit_bytes: int = 0, idle_bytes: int = 0) -> HostCache:
    return HostCache(HostPool(idle_bytes=idle_bytes), limit_bytes=limit_bytes)


def _entry(path: Path) -> FileEntry:
    return FileEntry(path.stat().st_size, digest_of(path.read_bytes()))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Tensors of several types, 5 MB together, out of the page cache."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "matrix": torch.randn(1000, 1000, generator=generator),
        "half": torch.randn(300, 700, generator=generator).half(),
        "brain": torch.randn(77, generator=generator).bfloat16(),
        "whole": torch.arange(10),
        "none": torch.zeros(0, 3),
        "scalar": torch.tensor(3.5),
    }
    path = tmp_path / "file.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    _drop_cache(path)
    return path


@pytest.mark.parametrize("size_bytes", [1, 4095, 4096, 4097, BLOCK_BYTES, BLOCK_BYTES + 1, 3 * BLOCK_BYTES + 12345])
@pytest.mark.parametrize("is_cached", [False, True])
def test_a_file_is_read_whole_and_in_order(size_bytes: int, is_cached: bool, tmp_path: Path) -> None:  # noqa: FBT001 - a parameter of the test
    content = os.urandom(size_bytes)
    path = tmp_path / "file"
    path.write_bytes(content)
    if not is_cached:
        _drop_cache(path)
    block = HostPool(idle_bytes=0).take(padded_bytes(size_bytes))
    with path.open("rb") as opened:
        seen = list(read_file(opened.fileno(), block, size_bytes))
    assert seen == sorted(seen)
    assert seen[-1] == size_bytes
    assert bytes(block[:size_bytes]) == content


def test_a_cold_file_is_read_past_the_page_cache(file: Path) -> None:
    with file.open("rb") as opened:
        assert not direct_read._is_cached(opened.fileno(), file.stat().st_size)
        _cache().read(file, None)
        assert not direct_read._is_cached(opened.fileno(), file.stat().st_size)
    file.read_bytes()
    with file.open("rb") as opened:
        assert direct_read._is_cached(opened.fileno(), file.stat().st_size)


def test_where_o_direct_is_not_to_be_had_files_are_read_all_the_same() -> None:
    path = Path(f"/dev/shm/darkroom-test-{os.getpid()}")  # noqa: S108 - the file system is the point
    try:
        save_file({"a": torch.arange(3 * _MIB)}, path)
        assert torch.equal(_cache().read(path, _entry(path)).tensors()["a"], torch.arange(3 * _MIB))
    finally:
        path.unlink()


@pytest.mark.parametrize("is_cached", [False, True])
def test_a_file_that_ends_too_early_is_no_endless_read(is_cached: bool, tmp_path: Path) -> None:  # noqa: FBT001 - a parameter of the test
    path = tmp_path / "file"
    path.write_bytes(bytes(BLOCK_BYTES + 5000))
    if not is_cached:
        _drop_cache(path)
    block = HostPool(idle_bytes=0).take(padded_bytes(3 * BLOCK_BYTES))
    with path.open("rb") as opened, pytest.raises(ShortFile):
        list(read_file(opened.fileno(), block, 3 * BLOCK_BYTES))


def test_tensors_are_those_of_the_file_in_place(file: Path) -> None:
    found = _cache().read(file, _entry(file))
    tensors = found.tensors()
    for name, tensor in load_file(file).items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)
    start = found.content.data_ptr()
    assert all(start <= t.data_ptr() < start + file.stat().st_size for t in tensors.values() if t.numel())
    assert found.header.metadata == {"format": "pt"}


@pytest.mark.parametrize("change", ["one bit", "short", "longer", "another", "no header", "NaN"])
def test_a_file_that_is_not_as_promised_is_refused(change: str, file: Path, tmp_path: Path) -> None:
    entry, content = _entry(file), bytearray(file.read_bytes())
    if change == "one bit":
        content[-1] ^= 1
    elif change == "short":
        del content[-1]
    elif change == "longer":
        content += b"!"
    elif change == "no header":
        content[:8] = (2**63).to_bytes(8, "little")
    elif change == "another":
        save_file({"a": torch.zeros(5)}, tmp_path / "other")
        content = bytearray((tmp_path / "other").read_bytes())
    else:
        save_file({"a": torch.tensor([1.0, torch.nan, 2.0])}, file)
        content, entry = bytearray(file.read_bytes()), _entry(file)
    file.write_bytes(content)
    cache = _cache(limit_bytes=1 << 30)
    with pytest.raises(Corrupt):
        cache.read(file, entry)
    assert cache.kept_bytes == 0


def test_concurrent_readers_share_one_read(file: Path) -> None:
    cache = _cache(limit_bytes=1 << 30)
    with ThreadPoolExecutor(20) as threads:
        found = list(threads.map(lambda _: cache.read(file, None), range(20)))
    assert cache.read_count == 1
    assert len(set(map(id, found))) == 1


def test_a_link_to_a_file_is_the_same_file(file: Path, tmp_path: Path) -> None:
    cache = _cache(limit_bytes=1 << 30)
    os.link(file, tmp_path / "linked")
    assert cache.read(file, None) is cache.read(tmp_path / "linked", None)


def test_what_is_kept_costs_no_disk_and_what_is_too_much_goes_least_recently_used_first(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in "abc"]
    for path in paths:
        save_file({"x": torch.zeros(_MIB // 4)}, path)
    cache = _cache(limit_bytes=2 * _MIB + 1000)
    for index in (0, 1, 0, 2, 0, 1):
        cache.read(paths[index], None)
        gc.collect()
    assert cache.read_count == 4  # a, b, c, and b again
    assert cache.kept_bytes <= 2 * _MIB + 1000


def test_a_file_that_models_share_outlives_what_each_has_alone(tmp_path: Path) -> None:
    paths = {name: tmp_path / name for name in ("shared", "one", "other", "new")}
    for path in paths.values():
        save_file({"x": torch.zeros(_MIB // 4)}, path)
    eviction = Eviction()
    cache = HostCache(HostPool(idle_bytes=0), limit_bytes=3 * _MIB + 1000, eviction=eviction)
    for name, model_id in (("shared", "a"), ("shared", "b"), ("one", "a"), ("other", "b")):
        cache.read(paths[name], None, model_id)
    for model_id in "ab":
        eviction.ran({model_id}, 1.0)
    cache.read(paths["new"], None, "c")
    cache.read(paths["shared"], None, "c")
    cache.read(paths["other"], None, "b")
    assert cache.read_count == 4
    cache.read(paths["one"], None, "a")
    assert cache.read_count == 5


def test_files_of_pinned_models_stay_and_what_then_finds_no_room_is_not_kept(tmp_path: Path) -> None:
    for name in ("small", "large", "new"):
        save_file({"x": torch.zeros(_MIB // (4 if name == "large" else 8))}, tmp_path / name)
    eviction = Eviction()
    eviction.pin({"large"})
    cache = HostCache(HostPool(idle_bytes=0), limit_bytes=3 * _MIB // 2 + 2000, eviction=eviction)
    for name in ("large", "small", "new"):
        cache.read(tmp_path / name, None, name)
        gc.collect()
    assert cache.kept_bytes == sum((tmp_path / name).stat().st_size for name in ("large", "new"))
    eviction.pin({"large", "new"})
    cache.read(tmp_path / "small", None, "small")
    cache.read(tmp_path / "large", None, "large")
    cache.read(tmp_path / "new", None, "new")
    assert cache.read_count == 4
    assert cache.kept_bytes == sum((tmp_path / name).stat().st_size for name in ("large", "new"))


def test_a_file_in_use_is_shared_even_where_nothing_is_kept(file: Path) -> None:
    cache = _cache()
    held = cache.read(file, None)
    assert cache.read(file, None) is held
    del held
    cache.read(file, None)
    assert cache.read_count == 2


def test_a_file_that_changed_is_read_anew(file: Path) -> None:
    cache = _cache(limit_bytes=1 << 30)
    cache.read(file, None)
    save_file({"matrix": torch.ones(2)}, file)
    assert torch.equal(cache.read(file, None).tensors()["matrix"], torch.ones(2))


def test_bytes_that_somebody_wrote_to_are_not_used_again(file: Path) -> None:
    cache = _cache(limit_bytes=1 << 30)
    cache.read(file, None).tensors()["matrix"].mul_(2)
    assert torch.equal(cache.read(file, None).tensors()["matrix"], load_file(file)["matrix"])


def test_a_file_may_be_read_in_inference_mode(file: Path) -> None:
    cache = _cache(limit_bytes=1 << 30)
    with torch.inference_mode():
        assert not cache.read(file, None).tensors()["matrix"].is_inference()
    cache.read(file, None)
    assert cache.read_count == 1


def test_a_block_comes_back_when_the_last_tensor_over_it_is_gone(file: Path) -> None:
    pool = HostPool(idle_bytes=1 << 30)
    cache = HostCache(pool, limit_bytes=0)
    one = cache.read(file, None).tensors()["half"]
    gc.collect()
    assert pool.idle_bytes == 0
    address = one.data_ptr()
    copied = one.clone()
    assert torch.equal(one, copied)
    del one
    gc.collect()
    assert pool.idle_bytes == padded_bytes(file.stat().st_size)
    again = cache.read(file, None).tensors()["half"]
    assert again.data_ptr() == address  # the same pages
    assert torch.equal(again, copied)
    assert pool.made_count == 1


def test_a_pool_keeps_no_more_than_it_may() -> None:
    pool = HostPool(idle_bytes=5 * _MIB)
    blocks = [pool.take(2 * _MIB) for _ in range(4)]
    del blocks
    assert pool.idle_bytes == 4 * _MIB


def test_a_prepared_pool_makes_nothing_for_files_that_fit() -> None:
    pool = HostPool(idle_bytes=20 * _MIB)
    pool.prepare([SizeClass(_MIB, 3.0), SizeClass(4 * _MIB, 1.0)], 12 * _MIB)
    made = pool.made_count
    held = [pool.take(size) for size in (1000_000, _MIB // 2, 3 * _MIB)]
    assert pool.made_count == made
    assert all(block.ctypes.data % ALIGNMENT == 0 for block in held)
    assert pool.take(100).nbytes == ALIGNMENT  # a large block is not spent on a small file


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(1, 200_000), st.booleans()), max_size=30))
def test_no_two_holders_have_one_block(steps: list[tuple[int, bool]]) -> None:
    pool, held = HostPool(idle_bytes=500_000), []
    for number, (size, drops) in enumerate(steps):
        block = pool.take(size)
        block[:] = number % 256
        held.append((number % 256, block))
        if drops:
            del held[0]
        assert all(bool((kept == value).all()) for value, kept in held)


def _store(root: Path) -> ModelStore:
    return ModelStore(Folder(root), _cache())


def test_an_indexed_folder_is_verified_in_place(file: Path, tmp_path: Path) -> None:
    (tmp_path / "root" / "one").mkdir(parents=True)
    path = tmp_path / "root" / "one" / "weights.safetensors"
    path.write_bytes(file.read_bytes())
    store = _store(tmp_path / "root")
    store.read(path)
    write_index(tmp_path / "root")
    store.read(path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(Corrupt, match="digest"):
        store.read(path)
    with pytest.raises(Corrupt, match="digest"):
        store.verify(path)


def test_reading_leaves_no_descriptors_and_no_threads(file: Path) -> None:
    cache = _cache()
    before = len(list(Path("/proc/self/fd").iterdir())), threading.active_count()
    for _ in range(5):
        cache.read(file, None)
    assert (len(list(Path("/proc/self/fd").iterdir())), threading.active_count()) == before


def test_a_truncated_file_does_not_kill_the_process(file: Path) -> None:
    """A mapped file would: the tensors are read, the file is cut, and they are read again."""
    script = (
        "import os, sys, torch\n"
        "from pathlib import Path\n"
        "from darkroom.models.store.model_store import store_of\n"
        "path = Path(sys.argv[1])\n"
        "tensors = store_of(path.parent.parent).read(path).tensors()\n"
        "os.truncate(path, 0)\n"
        "assert all(bool(t.float().isfinite().all()) for t in tensors.values())\n"
    )
    assert subprocess.run([sys.executable, "-c", script, str(file)], check=False).returncode == 0
