"""A gRPC server with health, reflection behind a flag, and a graceful end.

On SIGTERM or SIGINT: health says NOT_SERVING, new requests are refused with DRAINING, the registry is left, running
requests finish within the grace, and only then the process ends.
"""

import asyncio
import contextlib
import math
import signal
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection

from darkroom.runtime.channels import server_options
from darkroom.runtime.guard import Guard

_log = structlog.get_logger()
_LEAVE_S = 2.0


@dataclass(frozen=True, slots=True)
class Mounted:
    """A service to serve: what registers it, and its full name."""

    add_to_server: Callable[[grpc.aio.Server], None]
    name: str


def time_left_s(context: grpc.aio.ServicerContext) -> float:
    """Seconds until the caller's deadline; infinite without one."""
    left_s: float | None = context.time_remaining()  # None without a deadline, whatever the stubs say
    return math.inf if left_s is None else left_s


class Server:
    """The server of one service process."""

    def __init__(self, *, address: str, replica_id: str, reflect: bool, max_request_bytes: int, drain_s: float) -> None:
        """`address`: `host:port` to listen on, port 0 for any; `drain_s`: how long running requests may take."""
        self._replica_id, self._reflect, self._drain_s = replica_id, reflect, drain_s
        self._draining = False
        self._stop = asyncio.Event()
        guard = Guard(replica_id=replica_id, is_draining=lambda: self._draining)
        self._server = grpc.aio.server(interceptors=[guard], options=server_options(max_request_bytes))
        self._health = health_aio.HealthServicer()
        self.port = self._server.add_insecure_port(address)
        if not self.port:
            raise OSError(f"cannot listen on {address}")

    @property
    def is_draining(self) -> bool:
        """Whether new requests are refused."""
        return self._draining

    async def start(self, services: Sequence[Mounted]) -> None:
        """Serves these services."""
        names = [service.name for service in services]
        for service in services:
            service.add_to_server(self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        if self._reflect:
            reflection.enable_server_reflection(
                [*names, "grpc.health.v1.Health", reflection.SERVICE_NAME], self._server
            )
        await self._server.start()
        for name in ("", *names):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        _log.info("serving", port=self.port)

    async def run(
        self, background: Sequence[Coroutine[Any, Any, None]], on_drain: Sequence[Callable[[], Awaitable[None]]]
    ) -> None:
        """Runs until SIGTERM, SIGINT, or a background task fails; then drains, calling `on_drain` first."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        tasks = [asyncio.ensure_future(c) for c in background]
        stopped = asyncio.ensure_future(self._stop.wait())
        done, _ = await asyncio.wait([stopped, *tasks], return_when=asyncio.FIRST_COMPLETED)
        await self.drain(on_drain)
        for task in (stopped, *tasks):
            task.cancel()
        await asyncio.gather(stopped, *tasks, return_exceptions=True)
        for task in done - {stopped}:
            task.result()

    async def drain(self, on_drain: Sequence[Callable[[], Awaitable[None]]] = ()) -> None:
        """Takes nothing new, lets what runs finish, and stops."""
        _log.info("draining", drain_s=self._drain_s)
        self._draining = True
        await self._health.enter_graceful_shutdown()
        for leave in on_drain:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LEAVE_S):
                    await leave()
        await self._server.stop(grace=self._drain_s)
        _log.info("stopped")
