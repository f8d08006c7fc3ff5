"""The device's budget: idle models leave it for others, those in use stay, and what cannot fit is refused."""

import asyncio
import shutil
import weakref
from pathlib import Path

import pytest
import torch

from darkroom.errors import DeviceFull, ModelNotFound, UnusableModel
from darkroom.models.loader import load_part, part_sizes
from darkroom.models.replica import StageReplica
from darkroom.models.residency import Residency
from tests.tiny_models import save_tiny_model

_CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three models of one size; c shares its UNet's file with b."""
    root = tmp_path_factory.mktemp("store")
    save_tiny_model(root, "tiny-sd")
    for name in "abc":
        shutil.copytree(root / "tiny-sd", root / name)
    file = root / "c" / "unet" / "diffusion_pytorch_model.safetensors"
    file.unlink()
    file.hardlink_to(root / "b" / "unet" / "diffusion_pytorch_model.safetensors")
    return root


def _size(store: Path) -> int:
    return sum(part_sizes(store, "a", "denoiser", _CPU).values())


def _replica(store: Path, budget_bytes: int, *, wait_s: float = 0.1) -> StageReplica:
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
    replica._residency._wait_s = wait_s
    return replica


def _held(replica: StageReplica) -> list[str]:
    return [part.model_id for part in replica.state().parts]


def test_a_part_takes_as_many_bytes_as_was_said(store: Path) -> None:
    for stage in ("encoder", "denoiser", "vae"):
        part = load_part(store, "a", stage, _CPU)
        assert sum(state.resident_bytes for state in part.network_states()) == pytest.approx(
            sum(part_sizes(store, "a", stage, _CPU).values()), abs=1000
        )


async def test_without_a_budget_everything_stays(store: Path) -> None:
    replica = _replica(store, 0)
    for name in "ab":
        await replica.part(name)
    assert _held(replica) == ["a", "b"]
    replica.close()


async def test_the_model_used_longest_ago_leaves_and_that_is_announced(store: Path) -> None:
    replica, said = _replica(store, 2 * _size(store)), list[set[str]]()

    async def announce(model_ids: object) -> None:
        said.append(set(model_ids))  # type: ignore[call-overload]

    replica.on_loaded = announce
    for name in ("a", "b", "a", "tiny-sd"):
        async with replica.accepted():
            await replica.part(name)
    await asyncio.sleep(0)
    assert _held(replica) == ["a", "tiny-sd"]
    assert said[-1] == {"a", "tiny-sd"}
    replica.close()


async def test_what_is_dropped_frees_its_memory(store: Path) -> None:
    replica = _replica(store, _size(store))
    async with replica.accepted():
        part = await replica.part("a")
        weight = weakref.ref(next(part.networks["unet"].parameters()))
    del part
    async with replica.accepted():
        await replica.part("b")
    assert weight() is None
    replica.close()


async def test_a_model_in_use_stays_and_the_other_waits_for_it_but_not_for_ever(store: Path) -> None:
    replica = _replica(store, _size(store), wait_s=0.2)
    async with replica.accepted():
        await replica.part("a")
        with pytest.raises(DeviceFull, match="no room"):
            async with replica.accepted():
                await replica.part("b")
        assert _held(replica) == ["a"]
        replica._residency._wait_s = 20.0
        waiting = asyncio.create_task(replica.part("b"))
        await asyncio.sleep(0.3)
        assert not waiting.done()
    await waiting
    assert _held(replica) == ["b"]
    replica.close()


async def test_a_model_larger_than_the_device_is_refused_and_drops_nothing(store: Path) -> None:
    replica = _replica(store, _size(store) - 1)
    with pytest.raises(UnusableModel, match="needs"):
        await replica.part("a")
    replica.close()


async def test_models_that_share_files_take_their_room_once(store: Path) -> None:
    replica = _replica(store, _size(store))
    for name in "bc":
        async with replica.accepted():
            await replica.part(name)
    assert _held(replica) == ["b", "c"]
    replica.close()


async def test_a_load_that_fails_takes_no_room(store: Path) -> None:
    replica = _replica(store, _size(store))
    with pytest.raises(ModelNotFound):
        await replica.part("nowhere")
    await replica.part("a")
    assert len(replica._residency._entries) == 1
    replica.close()


async def test_what_is_asked_for_outside_a_request_is_held_by_nobody() -> None:
    residency = Residency(10)
    with residency.holding(), residency.holding():
        pass
    assert residency._entries == []
