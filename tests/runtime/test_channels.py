"""Channels follow the cluster: to replicas that left they are closed, and calls that still run there finish."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc

from darkroom.registry.membership import ClusterView, Registration
from darkroom.registry.memory import MemoryRegistry
from darkroom.registry.port import Member
from darkroom.runtime.channels import Channels

_METHOD = "/test.Slow/Call"


@contextlib.asynccontextmanager
async def slow_server(may_answer: asyncio.Event) -> AsyncIterator[str]:
    """A server whose one method answers when it is told to."""

    async def call(_request: bytes, _context: object) -> bytes:
        await may_answer.wait()
        return b"done"

    server = grpc.aio.server()
    handler = grpc.method_handlers_generic_handler("test.Slow", {"Call": grpc.unary_unary_rpc_method_handler(call)})
    server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(grace=None)


async def test_a_channel_to_a_replica_that_left_is_closed_once_its_calls_are_done() -> None:
    may_answer = asyncio.Event()
    registry = MemoryRegistry()
    view, channels = ClusterView(registry), Channels()
    async with slow_server(may_answer) as address:
        registration = Registration(registry, Member(replica_id="vae-1", stage="vae", address=address))
        following = [asyncio.create_task(work) for work in (view.run(), registration.run(), channels.follow(view))]
        await asyncio.wait_for(view.wait_for(lambda now: bool(now.members())), 5)
        method: Any = channels.to(address).unary_unary(_METHOD)
        running = asyncio.ensure_future(method(b"", timeout=10))
        await asyncio.sleep(0.2)
        await registration.leave()
        await asyncio.wait_for(view.wait_for(lambda now: not now.members()), 5)
        while channels.addresses:
            await asyncio.sleep(0.01)
        may_answer.set()
        assert await running == b"done"
        for task in following:
            task.cancel()
        await asyncio.gather(*following, return_exceptions=True)
        await channels.close()
