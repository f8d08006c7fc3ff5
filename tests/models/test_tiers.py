"""A replica brings models to disk, memory and device ahead of requests, lets them go, and keeps what is pinned."""

import asyncio
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import torch

from darkroom.errors import DeviceFull, ModelNotFound, UnusableModel
from darkroom.models.loader import part_sizes
from darkroom.models.replica import StageReplica
from darkroom.models.store.model_store import ModelStore, model_store
from darkroom.policy.worth import Tier
from darkroom.store.folder import Folder
from darkroom.store.indexing import write_index
from darkroom.store.node import NodeStore
from tests.tiny_models import save_tiny_model

NAMES = ("a", "b", "c")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three models of one size."""
    root = tmp_path_factory.mktemp("store")
    save_tiny_model(root, "tiny-sd")
    for name in NAMES:
        shutil.copytree(root / "tiny-sd", root / name)
    return root


def store_over(root: Path, *, host_cache_bytes: int = 1 << 30) -> ModelStore:
    return model_store(Folder(root), device="cpu", pool_bytes=0, host_cache_bytes=host_cache_bytes)


def replica_over(store: ModelStore, budget_bytes: int = 0) -> StageReplica:
    replica = StageReplica(
        replica_id="r",
        stage="denoiser",
        model_store=store,
        device="cpu",
        max_running=8,
        max_batch_rows=8,
        thread_count=1,
        device_budget_bytes=budget_bytes,
    )
    replica._residency._wait_s = 0.1
    return replica


@pytest.fixture
async def replica(root: Path) -> AsyncIterator[StageReplica]:
    made = replica_over(store_over(root))
    yield made
    made.close()


def tiers(replica: StageReplica, model_id: str) -> tuple[bool, bool, bool]:
    """Whether it is on device, in memory and on disk."""
    copy = replica.copies([model_id]).get(model_id)
    if copy is None:
        return False, False, False
    return copy.device_bytes is not None, copy.host_bytes is not None, copy.disk_bytes is not None


async def test_a_model_comes_nearer_tier_by_tier_and_is_let_go(replica: StageReplica) -> None:
    assert tiers(replica, "a") == (False, False, True)
    await replica.bring("a", Tier.HOST)
    assert tiers(replica, "a") == (False, True, True)
    read_count = replica.store._host.read_count
    await replica.bring("a", Tier.DEVICE)
    assert tiers(replica, "a") == (True, True, True)
    assert replica.store._host.read_count == read_count, "it was in memory already"
    assert await replica.release("a")
    assert tiers(replica, "a") == (False, False, True)
    assert [part.model_id for part in replica.state().parts] == []
    copy = replica.copies(["b"])["b"]
    assert copy.disk_bytes == (replica.store.root / "b/unet/diffusion_pytorch_model.safetensors").stat().st_size


async def test_what_a_request_uses_is_not_let_go(replica: StageReplica) -> None:
    async with replica.accepted():
        await replica.part("a")
        assert not replica.is_idle
        assert not await replica.release("a")
    assert replica.is_idle
    assert await replica.release("a")
    assert await replica.release("a"), "it is gone"


async def test_a_pinned_model_stays_whatever_comes(root: Path) -> None:
    size = sum(part_sizes(root, "a", "denoiser", torch.device("cpu")).values())
    replica = replica_over(store_over(root), 2 * size)
    await replica.bring("a", Tier.DEVICE)
    replica.keep(frozenset("a"))
    for name in ("b", "c", "tiny-sd"):
        await replica.part(name)
        assert tiers(replica, "a")[0]
    assert not await replica.release("a")
    replica.keep(frozenset(("a", "tiny-sd")))
    with pytest.raises(DeviceFull):
        await replica.part("b")
    replica.keep(frozenset())
    await replica.part("b")
    assert not tiers(replica, "a")[0]
    replica.close()


async def test_a_load_that_waits_for_room_comes_in_as_soon_as_a_pin_ends(root: Path) -> None:
    size = sum(part_sizes(root, "a", "denoiser", torch.device("cpu")).values())
    replica = replica_over(store_over(root), size)
    replica._residency._wait_s = 60.0
    replica.keep(frozenset("a"))
    await replica.part("a")
    waiting = asyncio.create_task(replica.part("b"))
    await asyncio.sleep(0.3)
    assert not waiting.done()
    replica.keep(frozenset("a"))
    replica.keep(frozenset())
    async with asyncio.timeout(30):
        await waiting
    assert not tiers(replica, "a")[0]
    replica.close()


async def test_files_that_models_share_stay_in_memory_until_the_last_is_let_go(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "a", tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "twin", copy_function=os.link)
    replica = replica_over(store_over(tmp_path))
    for name in ("a", "twin"):
        await replica.bring(name, Tier.HOST)
    assert replica.store._host.read_count == 1
    assert await replica.release("a")
    assert [tiers(replica, name)[1] for name in ("a", "twin")] == [False, True]
    assert await replica.release("twin")
    assert replica.store._host.kept_bytes == 0
    replica.close()


async def test_what_cannot_be_brought_says_why(replica: StageReplica, root: Path) -> None:
    for tier in (Tier.DISK, Tier.HOST, Tier.DEVICE):
        with pytest.raises(ModelNotFound):
            await replica.bring("nobody", tier)
    shutil.copytree(root / "a", root / "broken", dirs_exist_ok=True)
    (root / "broken" / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UnusableModel):
        await replica.bring("broken", Tier.HOST)
    shutil.rmtree(root / "broken")


async def test_a_remote_model_is_fetched_to_disk_and_no_further(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path / "remote")
    write_index(tmp_path / "remote")
    source = NodeStore(f"file://{tmp_path / 'remote'}", tmp_path / "cache", limit_bytes=1 << 30)
    replica = replica_over(model_store(source, device="cpu", pool_bytes=0, host_cache_bytes=1 << 30))
    assert tiers(replica, "a") == (False, False, False)
    await replica.bring("a", Tier.DISK)
    assert tiers(replica, "a") == (False, False, True)
    assert tiers(replica, "b") == (False, False, False)
    replica.close()
