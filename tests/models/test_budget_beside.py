"""What lies beside models counts in the device's budget too: LoRAs, which leave with their model, and ControlNets."""

import asyncio
import gc
import shutil
import weakref
from pathlib import Path

import pytest
import torch

from darkroom.errors import DeviceFull
from darkroom.models.controlnets import ControlNets, controlnet_sizes
from darkroom.models.loader import part_sizes
from darkroom.models.replica import StageReplica
from darkroom.wire.tasks import LoraUse
from tests.tiny.diffusion import controlnet
from tests.tiny_loras import save_lora_for
from tests.tiny_models import save_tiny_model

_CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models of one size, two LoRAs of one size for either, a ControlNet."""
    root = tmp_path_factory.mktemp("store")
    save_tiny_model(root, "tiny-sd")
    shutil.copytree(root / "tiny-sd", root / "other")
    for seed, name in enumerate(("ink", "chalk")):
        save_lora_for(root, name, root / "tiny-sd", seed=seed)
        (root / name / "darkroom.json").unlink()
    controlnet().save_pretrained(root / "edges")
    return root


def _part_bytes(store: Path) -> int:
    return sum(part_sizes(store, "tiny-sd", "denoiser", _CPU).values())


async def _lora_bytes(store: Path) -> int:
    replica = _replica(store, 0)
    async with replica.accepted(), replica.adapted(part := await replica.part("tiny-sd"), [LoraUse("ink", 1.0)]):
        size_bytes: int = part.beside["loras"].resident()["ink"]
    replica.close()
    return size_bytes


def _replica(store: Path, budget_bytes: int) -> StageReplica:
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


async def _draw(replica: StageReplica, model_id: str, *lora_ids: str) -> list[str]:
    """A request. Returns the LoRAs that its model has afterwards."""
    async with replica.accepted():
        part = await replica.part(model_id)
        async with replica.adapted(part, [LoraUse(lora_id, 1.0) for lora_id in lora_ids]):
            pass
        return sorted(part.beside["loras"].resident()) if "loras" in part.beside else []


def _held(replica: StageReplica) -> list[str]:
    return [part.model_id for part in replica.state().parts]


def _counted(replica: StageReplica) -> int:
    return sum(sum(entry.sizes.values()) for entry in replica._residency._entries)


async def test_a_lora_makes_an_idle_model_leave_and_leaves_with_its_own(store: Path) -> None:
    replica = _replica(store, 2 * _part_bytes(store) + await _lora_bytes(store) // 2)
    await _draw(replica, "other")
    assert await _draw(replica, "tiny-sd", "ink") == ["ink"]
    assert _held(replica) == ["tiny-sd"]
    assert _counted(replica) == _part_bytes(store) + await _lora_bytes(store)
    await _draw(replica, "other")
    assert _held(replica) == ["other"]
    assert _counted(replica) == _part_bytes(store)
    replica.close()


async def test_loras_that_nobody_uses_leave_before_models_do(store: Path) -> None:
    replica = _replica(store, 2 * _part_bytes(store) + await _lora_bytes(store))
    await _draw(replica, "other")
    assert await _draw(replica, "tiny-sd", "ink") == ["ink"]
    assert await _draw(replica, "tiny-sd", "chalk") == ["chalk"]
    assert _held(replica) == ["other", "tiny-sd"]
    replica.close()


async def test_a_lora_that_finds_no_room_is_refused_not_kept_and_drawn_with_later(store: Path) -> None:
    replica = _replica(store, 2 * _part_bytes(store) + await _lora_bytes(store) // 2)
    async with replica.accepted():
        await replica.part("other")
        with pytest.raises(DeviceFull, match="no room"):
            await _draw(replica, "tiny-sd", "ink")
        assert _counted(replica) == 2 * _part_bytes(store)
        assert await _draw(replica, "tiny-sd") == []
        replica._residency._wait_s = 20.0
        waiting = asyncio.create_task(_draw(replica, "tiny-sd", "ink"))
        await asyncio.sleep(0.3)
        assert not waiting.done()
    assert await waiting == ["ink"]
    assert _held(replica) == ["tiny-sd"]
    replica.close()


async def test_requests_at_once_with_loras_of_their_own_are_all_counted(store: Path) -> None:
    lora_bytes = await _lora_bytes(store)
    replica = _replica(store, _part_bytes(store) + 2 * lora_bytes)
    await asyncio.gather(*[_draw(replica, "tiny-sd", name) for name in ("ink", "chalk", "ink", "chalk")])
    assert _counted(replica) == _part_bytes(store) + 2 * lora_bytes
    replica.close()


async def test_a_model_that_had_a_lora_frees_its_memory_when_it_leaves(store: Path) -> None:
    replica = _replica(store, _part_bytes(store) + await _lora_bytes(store))
    await _draw(replica, "tiny-sd", "ink")
    weight = weakref.ref(next(replica.state().parts[0].networks["unet"].parameters()))
    gc.collect()
    gc.disable()
    try:
        await _draw(replica, "other")
        assert weight() is None
    finally:
        gc.enable()
    replica.close()


async def test_loras_of_a_part_that_nobody_has_any_more_are_counted_out(store: Path) -> None:
    replica = _replica(store, 10 * _part_bytes(store))
    await _draw(replica, "tiny-sd", "ink")
    async with replica.accepted():
        del (await replica.part("tiny-sd")).beside["loras"]
    gc.collect()
    assert _counted(replica) == _part_bytes(store)
    replica.close()


async def test_controlnets_are_counted(store: Path) -> None:
    net_bytes = sum(controlnet_sizes(store, "edges", _CPU).values())
    replica = _replica(store, _part_bytes(store) + net_bytes - 1)
    nets = ControlNets(store, _CPU)
    replica.share(nets)
    await _draw(replica, "tiny-sd")
    async with replica.accepted():
        await nets.get("edges")
    assert _held(replica) == ["edges"]
    assert _counted(replica) == net_bytes > 0
    replica.close()
