"""Cache managers in the test's own process, over a registry in memory, and replicas that only say what they have."""

import asyncio
import time
from collections.abc import Collection, Coroutine
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import grpc

from darkroom.registry.catalogue import publish_catalogue
from darkroom.registry.membership import ClusterView, Registration
from darkroom.registry.memory import MemoryRegistry
from darkroom.registry.port import Member, Rooms
from darkroom.registry.residence import Residence
from darkroom.runtime.server import Mounted, Server
from darkroom.v1 import cachemgr_pb2, cachemgr_pb2_grpc, stage_pb2
from darkroom.wire.times import duration
from services.cachemgr.config import CacheManagerConfig
from services.cachemgr.manager import CacheManager
from services.cachemgr.server import CacheManagerServicer
from tests.registry.entries import make_entry, make_lora_entry

MODELS = ("sd", "flux", "rare")
ROOM = 40 << 30
_STOP_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningManager:
    """A cache manager that serves."""

    manager: CacheManager
    address: str
    stub: cachemgr_pb2_grpc.CacheManagerServiceStub
    tasks: tuple[asyncio.Task[None], ...]

    async def kill(self) -> None:
        """Without a word: its lease is left to end."""
        for task in self.tasks:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def describe(self) -> cachemgr_pb2.DescribeCacheResponse:
        """The whole picture."""
        answer: cachemgr_pb2.DescribeCacheResponse = await self.stub.DescribeCache(
            cachemgr_pb2.DescribeCacheRequest(), timeout=5
        )
        return answer

    async def report(self, sequence: int, *, reporter_id: str = "router-1", **counts: int) -> bool:
        """Reports runs of 2 s at the denoisers, by model."""
        usages = [
            cachemgr_pb2.Usage(
                stage=stage_pb2.STAGE_DENOISER, model_id=name, count=count, run_duration=duration(2.0 * count)
            )
            for name, count in counts.items()
        ]
        request = cachemgr_pb2.ReportUsageRequest(reporter_id=reporter_id, sequence=sequence, usages=usages)
        return bool((await self.stub.ReportUsage(request, timeout=5)).counted)


class Managers:
    """Starts cache managers and replicas that see each other; stops all of them at the end."""

    def __init__(self) -> None:
        self.registry = MemoryRegistry()
        self._closing = AsyncExitStack()
        self._count = 0
        self.kept: Collection[str] = ()
        """What a manager was told last that operators keep."""

    async def __aenter__(self) -> Self:
        """Nobody there yet; the catalogue is."""
        entries = [make_entry(name) for name in MODELS]
        await publish_catalogue(self.registry, [*entries, make_lora_entry("ink")])
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stops everything. Raises TimeoutError if something does not stop."""
        async with asyncio.timeout(_STOP_S):
            await self._closing.aclose()

    def _keep(self, model_ids: Collection[str]) -> None:
        self.kept = model_ids

    async def manager(self) -> RunningManager:
        """A cache manager that plans ten times a second."""
        self._count += 1
        manager_id = f"cachemgr-{self._count}"
        server = Server(
            address="127.0.0.1:0", replica_id=manager_id, reflect=False, max_request_bytes=1 << 20, drain_s=1.0
        )
        view = ClusterView(self.registry)
        config = CacheManagerConfig(model_store=".", plan_interval_s=0.1, popularity_interval_s=0.1, lease_s=1)
        manager = CacheManager(manager_id, self.registry, view, config, clock=time.time, on_pins=self._keep)
        servicer = CacheManagerServicer(manager)
        await server.start(
            [
                Mounted(
                    lambda grpc_server: cachemgr_pb2_grpc.add_CacheManagerServiceServicer_to_server(
                        servicer, grpc_server
                    ),
                    "darkroom.v1.CacheManagerService",
                )
            ]
        )
        self._closing.push_async_callback(server._server.stop, grace=None)
        address = f"127.0.0.1:{server.port}"
        member = Registration(self.registry, Member(replica_id=manager_id, stage="cachemgr", address=address), ttl_s=1)
        tasks = [self._start(work) for work in (view.run(), member.run(), *manager.background())]
        channel = grpc.aio.insecure_channel(address)
        self._closing.push_async_callback(channel.close)
        await view.wait_for(lambda view: view.is_ready)
        stub = cachemgr_pb2_grpc.CacheManagerServiceStub(channel)
        return RunningManager(manager=manager, address=address, stub=stub, tasks=tuple(tasks))

    async def replica(
        self,
        replica_id: str,
        *held: str,
        room_bytes: int = ROOM,
        machine: str = "10.0.0.1",
        device: str = "cpu",
        disk_bytes: int | None = None,
    ) -> Registration:
        """A stage replica whose disk has every model, unless it has a bound."""
        member = Member(
            replica_id=replica_id,
            stage=replica_id.partition("-")[0],
            address=f"{machine}:7000",
            device=device,
            rooms=Rooms(device_bytes=room_bytes, host_bytes=0, disk_bytes=disk_bytes, evicts=True),
        )
        registration = Registration(self.registry, member)
        await registration.set_residences(dict.fromkeys(held, Residence(device_bytes=8 << 30, load_s=8.0)))
        self._start(registration.run())
        return registration

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)

        async def end() -> None:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

        self._closing.push_async_callback(end)
        return task
