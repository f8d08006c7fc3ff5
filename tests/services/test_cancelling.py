"""Many requests cancelled at random steps, under load: nothing stays behind, and nobody else notices."""

import asyncio
import ctypes
import gc
import itertools
import os
import random
import statistics
from pathlib import Path

import greenlet
import pytest
import torch

from tests.services.neighbours import Neighbours, RunningStage, eventually
from tests.services.test_denoiser import distance, finish, latents, start

STEPS = 24
# A leak grows every time; what an allocator keeps of a process that has run other tests before, once.
ROUNDS = 3
MEMORY_GROWTH_LIMIT_BYTES = 512 << 10
"""For each request."""


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.long)])
async def test_cancelled_requests_leave_nothing_behind_and_change_nobody(neighbours: Neighbours, count: int) -> None:
    denoiser = await neighbours.stage("denoiser")
    alone = [latents(await finish(start(denoiser, seed=seed, step_count=STEPS, deterministic=True))) for seed in (1, 2)]
    await cancel_some(denoiser, 40, random.Random(1))
    before_threads = os_threads()
    is_done = asyncio.Event()
    mates = [asyncio.create_task(keep_drawing(denoiser, is_done, seed)) for seed in (1, 2)]
    sizes = [resident_bytes()]
    for seed in range(ROUNDS):
        await cancel_some(denoiser, count // ROUNDS, random.Random(2 + seed))
        sizes.append(resident_bytes())
    is_done.set()
    drawn = await asyncio.gather(*mates)
    await eventually(lambda: denoiser.running_count == 0)
    for expected, (exact, rounded) in zip(alone, drawn, strict=True):
        assert exact
        assert rounded
        assert all(torch.equal(found, expected) for found in exact)
        assert max(distance(found, expected) for found in rounded) <= 1e-5
    engine = denoiser.replica._executor
    await eventually(lambda: (engine.resident_count, engine.queued_count) == (0, 0))
    gc.collect()
    alive = [
        found for found in gc.get_objects() if type(found) is greenlet.greenlet and found.parent and not found.dead
    ]
    assert not alive
    assert os_threads() <= before_threads + 2
    growth_bytes = statistics.median(after - before for before, after in itertools.pairwise(sizes))
    assert growth_bytes / (count // ROUNDS) < MEMORY_GROWTH_LIMIT_BYTES
    assert denoiser.shelf.size_bytes == 0


async def cancel_some(denoiser: RunningStage, count: int, chance: random.Random) -> None:
    """Starts requests, twenty at a time, and cancels each at a step of its own."""
    at_once = asyncio.Semaphore(20)

    async def cancel_one(seed: int, leave_after: int) -> None:
        async with at_once:
            call = start(denoiser, seed=seed, step_count=STEPS, checkpoint_interval=seed % 3)
            if leave_after:
                async for event in call:
                    if event.progress.step >= leave_after:
                        break
            call.cancel()

    await asyncio.gather(*(cancel_one(seed, chance.randrange(0, STEPS - 1)) for seed in range(count)))


async def keep_drawing(
    denoiser: RunningStage, is_done: asyncio.Event, seed: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Draws the same picture over and over, alone and batched, until told to stop."""
    exact: list[torch.Tensor] = []
    rounded: list[torch.Tensor] = []
    while not is_done.is_set() or not rounded:
        exact.append(latents(await finish(start(denoiser, seed=seed, step_count=STEPS, deterministic=True))))
        rounded.append(latents(await finish(start(denoiser, seed=seed, step_count=STEPS))))
    return exact, rounded


def resident_bytes() -> int:
    """What the process has in memory, without what it has freed and could give back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def os_threads() -> int:
    return sum(1 for _ in Path("/proc/self/task").iterdir())
