"""Servers and raw calls for tests of what surrounds a service."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc

from darkroom.runtime.channels import Channels
from darkroom.runtime.server import Mounted, Server


@asynccontextmanager
async def serving(*services: Mounted, drain_s: float = 5.0) -> AsyncIterator[Server]:
    """A server on a port of its own. Stops at once at the end, drained or not."""
    server = Server(
        address="127.0.0.1:0", replica_id="vae-1", reflect=False, max_request_bytes=1 << 20, drain_s=drain_s
    )
    await server.start(services)
    try:
        yield server
    finally:
        await server._server.stop(grace=None)


@asynccontextmanager
async def channel_to(server: Server) -> AsyncIterator[grpc.aio.Channel]:
    """A channel to a server of this process."""
    channels = Channels()
    try:
        yield channels.to(f"127.0.0.1:{server.port}")
    finally:
        await channels.close()


async def call_raw(channel: grpc.aio.Channel, method: str, raw: bytes) -> grpc.aio.AioRpcError | None:
    """Sends bytes as they are to a method that answers once. Returns what the call failed with."""
    try:
        call: Any = channel.unary_unary(method)
        await call(raw, timeout=10.0)
    except grpc.aio.AioRpcError as error:
        return error
    return None


async def stream_raw(
    channel: grpc.aio.Channel, method: str, raw: bytes
) -> tuple[Sequence[bytes], grpc.aio.AioRpcError | None]:
    """Sends bytes as they are to a method that streams. Returns what came, and what the call failed with."""
    came: list[bytes] = []
    try:
        call: Any = channel.unary_stream(method)
        async for response in call(raw, timeout=10.0):
            came.append(response)  # noqa: PERF401 - what came before the failure counts
    except grpc.aio.AioRpcError as error:
        return came, error
    return came, None
