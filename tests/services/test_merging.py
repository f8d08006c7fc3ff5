"""Merged pairs through the denoiser's service: they come of requests, and change no picture."""

import asyncio
import math
import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from darkroom.models.merging import MergedPairs
from darkroom.policy.fusion import PairCosts
from darkroom.runtime.stage_service import state_message
from darkroom.v1 import lora_pb2, stage_pb2
from tests.services.neighbours import MODEL, Neighbours, RunningStage, engine_held, eventually
from tests.services.test_denoiser import distance, finish, latents, start
from tests.tiny_loras import save_lora_for

LORA_IDS = [f"lora-{number}" for number in range(4)]
LORAS = [lora_pb2.Lora(lora_id=lora_id, scale=0.02 * (1 + number)) for number, lora_id in enumerate(LORA_IDS)]
OTHER = [lora_pb2.Lora(lora_id=LORA_IDS[0], scale=0.1)]
"""Weak: what strong random ones draw differs by a tenth for a difference of rounding."""


@pytest.fixture
async def neighbours(tiny_store: Path, tmp_path: Path) -> AsyncIterator[Neighbours]:
    """Over a model with LoRAs."""
    shutil.copytree(tiny_store / MODEL, tmp_path / MODEL)
    for seed, lora_id in enumerate(LORA_IDS):
        save_lora_for(tmp_path, lora_id, tmp_path / MODEL, seed=seed, rank=64)  # dear enough to show on a busy machine
    async with Neighbours(tmp_path) as started:
        yield started


@dataclass(slots=True)
class Beside:
    """Counts the forwards that ran LoRAs beside the base, from when one has."""

    count: int = 0
    _hooks: list[Any] = field(default_factory=list)

    async def watch(self, stage: RunningStage) -> None:
        adapters = (await stage.replica.part(MODEL)).beside["loras"]
        tree = adapters._networks["unet"]._tree
        layer = tree.get_submodule("down_blocks.0.resnets.0.conv1")
        layer.register_forward_pre_hook(self._note)

    def _note(self, *_args: object) -> None:
        self.count += 1


class Dear(PairCosts):
    """LoRAs beside their base cost a second a request, whatever a busy machine measures."""

    def adapter_s(self, name: str) -> float:
        del name
        return 1.0


def merging_of(stage: RunningStage) -> MergedPairs:
    """What it keeps merged from now on, looked over when `merge` says so."""
    stage.replica.keep_merged(50, 1 << 30)
    pairs = stage.replica._merging
    assert pairs is not None
    pairs._due_s = math.inf
    pairs.costs = Dear()
    return pairs


async def merge(stage: RunningStage, pairs: MergedPairs, loras: list[lora_pb2.Lora]) -> None:
    """Asks for a pair until it is merged."""
    before = len(pairs._copies)
    await finish(start(stage))  # it is known from now on what steps take without LoRAs
    for _ in range(4):
        await finish(start(stage, loras=loras))
    pairs._due_s = 0.0
    await finish(start(stage, loras=loras))
    await eventually(lambda: len(stage.replica.state().merged[MODEL]) > before)


async def test_after_some_requests_a_pair_is_merged_and_later_ones_cost_no_adapter_work(neighbours: Neighbours) -> None:
    denoiser = await neighbours.stage("denoiser")
    pairs, beside = merging_of(denoiser), Beside()
    exact = latents(await finish(start(denoiser, loras=LORAS, deterministic=True)))
    await merge(denoiser, pairs, LORAS)
    await beside.watch(denoiser)
    merged = latents(await finish(start(denoiser, loras=LORAS)))
    assert 0 < distance(merged, exact) <= 1e-5
    assert beside.count == 0
    assert torch.equal(latents(await finish(start(denoiser, loras=LORAS, deterministic=True))), exact)
    assert beside.count == 4
    assert distance(latents(await finish(start(denoiser, loras=OTHER))), exact) > 0.01
    assert beside.count == 8


async def test_requests_of_two_pairs_and_the_base_at_once_each_come_out_right(neighbours: Neighbours) -> None:
    denoiser = await neighbours.stage("denoiser")
    pairs = merging_of(denoiser)
    wishes = [[], LORAS, OTHER, LORAS, [], OTHER]
    expected = [latents(await finish(start(denoiser, loras=loras, deterministic=True))) for loras in wishes]
    await merge(denoiser, pairs, LORAS)
    await merge(denoiser, pairs, OTHER)
    async with engine_held(denoiser):
        calls = [asyncio.create_task(finish(start(denoiser, loras=loras))) for loras in wishes]
        await eventually(lambda: denoiser.running_count == len(wishes))
        await asyncio.sleep(0.05)
    for loras, result, exact in zip(wishes, await asyncio.gather(*calls), expected, strict=True):
        assert distance(latents(result), exact) <= 1e-5
        assert not loras or result.batched_forward_count > 0


async def test_a_checkpoint_goes_on_whether_its_pair_is_merged_or_not(neighbours: Neighbours) -> None:
    denoiser = await neighbours.stage("denoiser")
    pairs, changes = merging_of(denoiser), {"loras": LORAS, "step_count": 8}
    exact = latents(await finish(start(denoiser, deterministic=True, **changes)))
    made: dict[bool, Any] = {}
    for is_merged in (False, True):
        if is_merged:
            await merge(denoiser, pairs, LORAS)
        async for event in start(denoiser, checkpoint_interval=1, **changes):
            if event.progress.step == 3:
                made[is_merged] = event.progress.checkpoint
    for checkpoint in made.values():
        rest = await finish(start(denoiser, checkpoint=checkpoint, **changes))
        assert rest.forward_count == 5
        assert distance(latents(rest), exact) <= 1e-5
    pairs.spare(1 << 30)
    assert denoiser.replica.state().merged == {MODEL: ()}
    rest = await finish(start(denoiser, checkpoint=made[True], **changes))
    assert distance(latents(rest), exact) <= 1e-5


async def test_a_pair_merged_and_dropped_in_the_midst_of_requests_changes_none_of_them(neighbours: Neighbours) -> None:
    denoiser = await neighbours.stage("denoiser")
    pairs, changes = merging_of(denoiser), {"loras": LORAS, "step_count": 60}
    exact = latents(await finish(start(denoiser, deterministic=True, **changes)))

    async def midway(call: Any, *, does: Any) -> torch.Tensor:
        async for event in call:
            if event.progress.step == 5:
                await does()
        return latents(event.result)

    found = await midway(start(denoiser, **changes), does=lambda: merge(denoiser, pairs, LORAS))
    assert distance(found, exact) <= 1e-5

    async def drop() -> None:
        (copy,) = pairs._copies.values()
        assert copy.holder_count == 1
        pairs.most = 0
        await pairs.look()

    found = await midway(start(denoiser, **changes), does=drop)
    assert distance(found, exact) <= 1e-5
    assert denoiser.replica.state().merged == {MODEL: ()}


async def test_a_replica_says_which_pairs_it_keeps_merged(neighbours: Neighbours) -> None:
    denoiser = await neighbours.stage("denoiser")
    await merge(denoiser, merging_of(denoiser), LORAS)
    described: stage_pb2.DescribeReplicaResponse = state_message(denoiser.replica.state(), draining=False)
    (pair,) = described.models[0].merged_pairs
    assert list(pair.loras) == LORAS
    assert 0 < pair.size_bytes < sum(network.resident_bytes for network in described.models[0].networks)
