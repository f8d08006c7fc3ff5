"""Models whose weights the disk has no room for: read past it into memory, checked as any, known as what they are."""

import gc
import shutil
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from darkroom.errors import StoreUnavailable, UnusableModel
from darkroom.models.loader import load_part, part_sizes
from darkroom.models.lora_file import read_tensors, weights_file
from darkroom.models.replica import StageReplica
from darkroom.models.store.host import HostCache
from darkroom.models.store.model_store import ModelStore, model_store
from darkroom.models.store.pool import HostPool, available_bytes
from darkroom.models.tiers import Copy
from darkroom.policy.worth import Tier
from darkroom.store.indexing import write_index
from darkroom.store.manifest import FileEntry, digest_of
from darkroom.store.node import NodeStore
from darkroom.store.source import Afar
from tests.store.servers import Nginx, needs_nginx, nginx
from tests.tiny_models import save_tiny_model

pytestmark = needs_nginx
_CPU = torch.device("cpu")
_UNET = "unet/diffusion_pytorch_model.safetensors"
_SMALL_BYTES = 100_000
"""Room for a tiny model's configs and vocabulary, and for none of its weights."""


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A model and a LoRA."""
    root = tmp_path / "remote"
    save_tiny_model(root, "tiny-sd")
    (root / "ink").mkdir()
    save_file({"unet.x.lora_A.weight": torch.ones(2, 60_000)}, root / "ink" / "ink.safetensors")
    write_index(root)
    return root


@pytest.fixture
def web(files: Path, tmp_path: Path) -> Iterator[Nginx]:
    with nginx(files, tmp_path / "nginx") as server:
        yield server


def _open(
    web: Nginx, tmp_path: Path, *, limit_bytes: int = _SMALL_BYTES, host_cache_bytes: int = 1 << 30
) -> ModelStore:
    source = NodeStore(web.url, tmp_path / "cache", limit_bytes=limit_bytes, refresh_s=0.0)
    return model_store(source, device="cpu", pool_bytes=0, host_cache_bytes=host_cache_bytes)


def _on_disk(store: ModelStore) -> list[str]:
    return [path.name for path in store.root.rglob("*.safetensors")]


@pytest.mark.parametrize("stage", ["encoder", "denoiser", "vae"])
def test_a_part_is_the_same_as_from_the_disk(stage: str, web: Nginx, files: Path, tmp_path: Path) -> None:
    store = _open(web, tmp_path)
    part, plain = (load_part(where, "tiny-sd", stage, _CPU) for where in (store, files))
    for name, network in plain.networks.items():
        state = part.networks[name].state_dict()
        for key, tensor in network.state_dict().items():
            assert tensor.is_meta or torch.equal(state[key], tensor)
    assert _on_disk(store) == []


def test_its_size_is_known_by_its_header_alone(web: Nginx, files: Path, tmp_path: Path) -> None:
    store = _open(web, tmp_path)
    assert [*part_sizes(store, "tiny-sd", "denoiser", _CPU).values()] == [
        *part_sizes(files, "tiny-sd", "denoiser", _CPU).values()
    ]
    assert store._host.kept_bytes == 0


def test_those_who_want_a_file_at_once_share_one_stream(web: Nginx, tmp_path: Path) -> None:
    store = _open(web, tmp_path)
    store.fetch_configs("tiny-sd")
    store.fetch_weights("tiny-sd", "unet")
    with ThreadPoolExecutor(20) as threads:
        found = list(threads.map(lambda _: store.read(store.root / "tiny-sd" / _UNET), range(20)))
    assert web.fetch_count(_UNET) == 1
    assert len(set(map(id, found))) == 1


def test_what_came_past_the_disk_is_not_read_again_once_it_is_there(web: Nginx, tmp_path: Path) -> None:
    store = _open(web, tmp_path)
    load_part(store, "tiny-sd", "denoiser", _CPU)
    store._source._objects.weights_limit_bytes = 1 << 30  # type: ignore[attr-defined]
    load_part(store, "tiny-sd", "denoiser", _CPU)
    assert _on_disk(store) == ["diffusion_pytorch_model.safetensors"]
    assert store._host.read_count == 0


@pytest.mark.parametrize("change", ["one bit", "no header", "NaN"])
def test_a_file_that_is_not_as_it_must_be_is_refused_and_not_kept(
    change: str, web: Nginx, files: Path, tmp_path: Path
) -> None:
    path = files / "tiny-sd" / _UNET
    content = bytearray(path.read_bytes())
    if change == "one bit":
        content[-1] ^= 1
    elif change == "no header":
        content[:8] = (2**63).to_bytes(8, "little")
    else:
        tensors = load_file(path)
        tensors["conv_in.bias"][0] = torch.nan
        save_file(tensors, path, metadata={"format": "pt"})
        content = bytearray(path.read_bytes())
    if change == "NaN":
        write_index(files)
    path.write_bytes(content)
    store = _open(web, tmp_path)
    for _ in range(3):
        with pytest.raises(UnusableModel):
            load_part(store, "tiny-sd", "denoiser", _CPU)
    assert web.fetch_count(_UNET) == 1
    assert store._host.kept_bytes == 0
    load_part(store, "tiny-sd", "vae", _CPU)


def test_a_file_that_memory_has_no_room_for_is_not_begun() -> None:
    cache = HostCache(HostPool(idle_bytes=0), limit_bytes=0)
    entry = FileEntry(available_bytes() * 2, digest_of(b""))
    afar = Afar(entry, lambda: pytest.fail("it was asked for"), lambda: b"")
    with pytest.raises(StoreUnavailable, match="memory"):  # another node may have more
        cache.read_afar(afar, "big")


def test_what_is_in_memory_comes_back_while_the_store_is_down(web: Nginx, tmp_path: Path) -> None:
    store = _open(web, tmp_path)
    size = part_sizes(store, "tiny-sd", "denoiser", _CPU)
    load_part(store, "tiny-sd", "denoiser", _CPU)
    web.stop()
    assert part_sizes(store, "tiny-sd", "denoiser", _CPU) == size
    load_part(store, "tiny-sd", "denoiser", _CPU)


def test_what_is_in_memory_does_not_come_again_when_the_disk_drops_it(web: Nginx, tmp_path: Path) -> None:
    store = _open(web, tmp_path, limit_bytes=1 << 30)
    load_part(store, "tiny-sd", "denoiser", _CPU)
    (store.root / "tiny-sd" / _UNET).unlink()
    store.read(store.root / "tiny-sd" / _UNET)
    assert web.fetch_count(_UNET) == 1
    assert len(store._host._kept) == 1


def test_what_arrives_in_small_blocks_is_one_file(files: Path) -> None:
    content = (files / "tiny-sd" / _UNET).read_bytes()
    cache = HostCache(HostPool(idle_bytes=0), limit_bytes=0)
    entry = FileEntry(len(content), digest_of(content))
    afar = Afar(entry, lambda: (content[at : at + 1000] for at in range(0, len(content), 1000)), lambda: b"")
    found = cache.read_afar(afar, "tiny-sd").tensors()
    for name, tensor in load_file(files / "tiny-sd" / _UNET).items():
        assert torch.equal(found[name], tensor)


def test_a_lora_comes_past_the_disk(web: Nginx, tmp_path: Path) -> None:
    store = _open(web, tmp_path)
    tensors, _ = read_tensors(store, weights_file(store, "ink"), 1 << 30)
    assert torch.equal(tensors["unet.x.lora_A.weight"], torch.ones(2, 60_000))
    assert _on_disk(store) == []


def test_a_network_that_only_its_library_can_build_says_that_the_disk_has_no_room(
    web: Nginx, files: Path, tmp_path: Path
) -> None:
    path = files / "tiny-sd" / _UNET
    tensors = load_file(path)
    del tensors["conv_in.bias"]
    save_file(tensors, path, metadata={"format": "pt"})
    write_index(files)
    with pytest.raises(StoreUnavailable, match="no room"):
        load_part(_open(web, tmp_path), "tiny-sd", "denoiser", _CPU)


def test_memory_comes_back_when_the_model_is_gone(web: Nginx, tmp_path: Path) -> None:
    store = _open(web, tmp_path, host_cache_bytes=0)
    store._host._pool._idle_bytes = 1 << 30
    part = load_part(store, "tiny-sd", "denoiser", _CPU)
    assert store._host._pool.idle_bytes == 0
    gc.disable()
    try:
        del part
        assert store._host._pool.idle_bytes > 0
    finally:
        gc.enable()


@pytest.fixture
async def replica(web: Nginx, tmp_path: Path) -> AsyncIterator[StageReplica]:
    made = StageReplica(
        replica_id="r",
        stage="denoiser",
        model_store=_open(web, tmp_path),
        device="cpu",
        max_running=8,
        max_batch_rows=8,
        thread_count=1,
    )
    yield made
    made.close()


async def test_it_is_in_memory_and_not_on_disk_for_all_to_see(replica: StageReplica, files: Path) -> None:
    with pytest.raises(StoreUnavailable, match="no room"):
        await replica.bring("tiny-sd", Tier.DISK)
    assert replica.copies(["tiny-sd"]) == {}
    await replica.bring("tiny-sd", Tier.HOST)
    size_bytes = (files / "tiny-sd" / _UNET).stat().st_size
    assert replica.copies(["tiny-sd"]) == {"tiny-sd": Copy(host_bytes=size_bytes)}
    await replica.bring("tiny-sd", Tier.DEVICE)
    copy = replica.copies(["tiny-sd"])["tiny-sd"]
    assert copy.device_bytes is not None
    assert (copy.host_bytes, copy.disk_bytes) == (size_bytes, None)
    assert await replica.release("tiny-sd")
    assert replica.copies(["tiny-sd"]) == {}


def test_a_folder_that_lies_beside_is_no_model(web: Nginx, files: Path, tmp_path: Path) -> None:
    """What one entry has afar is not another's."""
    shutil.copytree(files / "tiny-sd", files / "twin")
    write_index(files)
    store = _open(web, tmp_path)
    load_part(store, "tiny-sd", "denoiser", _CPU)
    assert store.weights(store.root / "tiny-sd" / "vae") == []
    assert [path.parent.name for path in store.weights(store.root / "tiny-sd" / "unet")] == ["unet"]
    assert store.weights(store.root / "nowhere") == []
