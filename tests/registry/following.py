"""Waits, for tests of what happens by itself after a while."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any

from darkroom.registry.port import Registry

State = dict[str, bytes]


async def until(predicate: Callable[[], bool], *, within_s: float = 5.0) -> float:
    """Returns how long it took until the predicate held. Raises TimeoutError."""
    loop = asyncio.get_running_loop()
    started_s = loop.time()
    async with asyncio.timeout(within_s):
        while not predicate():
            await asyncio.sleep(0.01)
    return loop.time() - started_s


@asynccontextmanager
async def running(work: Coroutine[Any, Any, None]) -> AsyncIterator[asyncio.Task[None]]:
    """Runs `work` beside the block and cancels it at the end. What it raised by itself is raised there."""
    task = asyncio.create_task(work)
    try:
        yield task
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


@asynccontextmanager
async def watching(registry: Registry, prefix: str) -> AsyncIterator[list[State]]:
    """The states that a watch yields, in a list that grows."""
    states: list[State] = []

    async def follow() -> None:
        async for state in registry.watch(prefix):
            states.append(state)  # noqa: PERF401 - it grows while others read it

    async with running(follow()):
        await until(lambda: bool(states), within_s=10.0)
        yield states
