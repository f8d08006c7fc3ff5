"""Stage replicas and routers in the test's own process: wired as their `__main__` does, over a registry in memory."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
import torch

from darkroom.models.controlnets import ControlNets
from darkroom.models.ip_adapters import IpAdapters
from darkroom.models.preparing import Preparations
from darkroom.models.program import Ticket
from darkroom.models.replica import StageReplica
from darkroom.registry.catalogue import publish_catalogue, read_model_store
from darkroom.registry.membership import ClusterView, Registration
from darkroom.registry.memory import MemoryRegistry
from darkroom.registry.port import Member
from darkroom.runtime.channels import Channels
from darkroom.runtime.exchange import TensorServicer, TensorShelf, TensorSource
from darkroom.runtime.networks import NetworkCalls, NetworkServicer
from darkroom.runtime.server import Mounted, Server
from darkroom.runtime.stage_service import StageServicer
from darkroom.v1 import (
    denoiser_pb2,
    denoiser_pb2_grpc,
    encoder_pb2_grpc,
    network_pb2_grpc,
    router_pb2_grpc,
    stage_pb2_grpc,
    tensor_pb2_grpc,
    vae_pb2_grpc,
)
from darkroom.wire.graphs import Node
from services.denoiser.denoising import Denoising
from services.denoiser.server import DenoiserServicer
from services.encoder.cache import EmbeddingCache
from services.encoder.encoding import Encoding
from services.encoder.server import EncoderServicer
from services.router.calls import CallSettings, Preparation
from services.router.running import GraphRunner
from services.router.server import RouterServicer
from services.router.stages import GrpcStages
from services.vae.decoding import Decoding
from services.vae.server import VaeServicer
from tests.registry.following import until

MODEL = "tiny-sd"
SIZE_PX = 32
"""What MODEL draws by default."""

eventually = partial(until, within_s=20.0)
"""For what takes milliseconds, and seconds on a machine that has other work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningStage:
    """A replica that serves."""

    replica: StageReplica
    shelf: TensorShelf
    server: Server
    registration: Registration
    channel: grpc.aio.Channel

    @property
    def running_count(self) -> int:
        """Requests accepted and not yet answered."""
        return self.replica.state().running_count

    @property
    def forward_count(self) -> int:
        """Forwards run since the start."""
        return self.replica.state().engine.forwards

    @property
    def batch_count(self) -> int:
        """Batches run since the start."""
        return self.replica.state().engine.batches

    async def kill(self) -> None:
        """Breaks every connection. The registry lists the replica until its lease ends."""
        await self.server._server.stop(grace=None)


class Heard(GrpcStages):
    """Stages, and what came of hints to them."""

    def __init__(self, channels: Channels) -> None:
        super().__init__(channels)
        self.asked: list[str] = []
        """Stages that were sent a hint."""
        self.prepared: list[Preparation] = []
        """What they answered."""

    async def prepare(self, address: str, node: Node, settings: CallSettings) -> Preparation:
        self.asked.append(node.stage)
        self.prepared.append(await super().prepare(address, node, settings))
        return self.prepared[-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningRouter:
    """A router that serves, and what it runs graphs with."""

    runner: GraphRunner
    heard: Heard
    view: ClusterView
    server: Server
    stub: router_pb2_grpc.RouterServiceStub

    @property
    def address(self) -> str:
        """Where it listens."""
        return f"127.0.0.1:{self.server.port}"


class Neighbours:
    """Starts replicas and routers that see each other; stops all of them at the end."""

    def __init__(self, store: Path) -> None:
        """`store`: the model store that all share."""
        self._store = store
        self.registry = MemoryRegistry()
        self._channels = Channels()
        self._view = ClusterView(self.registry)
        self._closing = AsyncExitStack()
        self._stages: list[RunningStage] = []

    async def __aenter__(self) -> Self:
        """The neighbours, nobody there yet; the catalogue is."""
        self._closing.push_async_callback(self._channels.close)
        await publish_catalogue(self.registry, read_model_store(self._store).models)
        self._start(self._view.run())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stops everything."""
        await self._closing.aclose()

    async def stage(
        self,
        stage: str,
        number: int = 1,
        *,
        max_running: int = 64,
        inline_limit_bytes: int = 1 << 20,
        cache_bytes: int = 1 << 20,
        is_cold: bool = False,
        takes_hints: bool = True,
    ) -> RunningStage:
        """A replica, registered as `stage-number` and holding MODEL unless it is cold.

        `takes_hints`: whether it has StageService, which earlier versions of it did not prepare by.
        """
        replica_id = f"{stage}-{number}"
        server = _server(replica_id)
        address = f"127.0.0.1:{server.port}"
        shelf = TensorShelf(limit_bytes=1 << 20, inline_limit_bytes=inline_limit_bytes)
        shelf.address = address
        replica = StageReplica(
            replica_id=replica_id,
            stage=stage,
            model_store=self._store,
            device="cpu",
            max_running=max_running,
            max_batch_rows=16,
            thread_count=1,
        )
        self._closing.callback(replica.close)
        registration = Registration(self.registry, Member(replica_id=replica_id, stage=stage, address=address))
        replica.on_loaded = registration.set_models
        source = TensorSource(self._channels, shelf, lambda: {member.address for member in self._view.members()})
        nets = ControlNets(self._store, torch.device("cpu"))
        held = nets.get if stage == "controlnet" else replica.part
        calls = NetworkCalls(replica, self._view, self._channels, shelf, source, held=held)
        replica.send = calls.send
        services = [_tensors(shelf), _networks(calls)]
        if takes_hints:
            hints = Preparations(replica, held, nets if stage == "denoiser" else None)
            services.append(_stages(StageServicer(replica, hints, lambda: server.is_draining)))
        if stage != "controlnet":
            services.append(_service(stage, replica, shelf, source, nets, cache_bytes=cache_bytes))
        if stage != "controlnet" and not is_cold:
            await replica.part(MODEL)
        await server.start(services)
        self._closing.push_async_callback(server._server.stop, grace=None)
        self._start(registration.run())
        await self._view.wait_for(lambda view: address in {member.address for member in view.members()})
        running = RunningStage(
            replica=replica,
            shelf=shelf,
            server=server,
            registration=registration,
            channel=self._channels.to(address),
        )
        self._stages.append(running)
        return running

    def stages(self, stage: str) -> list[RunningStage]:
        """The replicas of a stage that were started, first one first."""
        return [running for running in self._stages if running.replica.stage == stage]

    async def router(
        self,
        *,
        replica_wait_s: float = 5.0,
        max_running: int = 64,
        default_deadline_s: float = 60.0,
        prepares_stages: bool = True,
    ) -> RunningRouter:
        """A router that sees all replicas that are up now."""
        server = _server("router-1")
        view = ClusterView(self.registry)
        heard = Heard(self._channels)
        runner = GraphRunner(
            view, heard, replica_wait_s=replica_wait_s, max_running=max_running, prepares_stages=prepares_stages
        )
        servicer = RouterServicer(runner, view, default_model=MODEL, default_deadline_s=default_deadline_s)
        self._start(view.run())
        await view.wait_for(lambda view: view.is_ready)
        await server.start(
            [
                Mounted(
                    lambda grpc_server: router_pb2_grpc.add_RouterServiceServicer_to_server(servicer, grpc_server),
                    "darkroom.v1.RouterService",
                )
            ]
        )
        self._closing.push_async_callback(server._server.stop, grace=None)
        stub = router_pb2_grpc.RouterServiceStub(self._channels.to(f"127.0.0.1:{server.port}"))
        return RunningRouter(runner=runner, heard=heard, view=view, server=server, stub=stub)

    async def list_dead(self, stage: str, replica_id: str, address: str) -> None:
        """Registers a replica that nobody serves, holding MODEL."""
        registration = Registration(self.registry, Member(replica_id=replica_id, stage=stage, address=address))
        await registration.set_models([MODEL])
        self._start(registration.run())
        await self._view.wait_for(lambda view: address in {member.address for member in view.members()})

    async def list_silent(self, stage: str, replica_id: str) -> None:
        """A denoiser that says once that it lives, and nothing more."""
        server = _server(replica_id)
        silent = Mounted(
            lambda grpc_server: denoiser_pb2_grpc.add_DenoiserServiceServicer_to_server(_Silent(), grpc_server),
            "darkroom.v1.DenoiserService",
        )
        await server.start([silent])
        self._closing.push_async_callback(server._server.stop, grace=None)
        await self.list_dead(stage, replica_id, f"127.0.0.1:{server.port}")

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)

        async def end() -> None:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

        self._closing.push_async_callback(end)


class _Silent(denoiser_pb2_grpc.DenoiserServiceServicer):
    async def Denoise(
        self, request: denoiser_pb2.DenoiseRequest, context: Any
    ) -> AsyncIterator[denoiser_pb2.DenoiseResponse]:
        del request, context
        yield denoiser_pb2.DenoiseResponse(alive=denoiser_pb2.DenoiseAlive())
        await asyncio.sleep(3600)


@asynccontextmanager
async def engine_held(stage: RunningStage) -> AsyncIterator[None]:
    """Inside the block the replica's engine runs nothing: what is asked of it waits."""
    is_held, release = threading.Event(), threading.Event()

    def hold() -> None:
        is_held.set()
        release.wait(timeout=30.0)

    holding = asyncio.create_task(stage.replica.run(hold, Ticket(alone=True)))
    await eventually(is_held.is_set)
    try:
        yield
    finally:
        release.set()
        await holding


async def failure_of(call: Any) -> grpc.aio.AioRpcError:
    """What a call, of one answer or a stream of them, fails with."""
    try:
        if isinstance(call, grpc.aio.UnaryUnaryCall):
            await call
        else:
            async for _ in call:
                pass
    except grpc.aio.AioRpcError as error:
        return error
    raise AssertionError("the call did not fail")


def _server(replica_id: str) -> Server:
    return Server(address="127.0.0.1:0", replica_id=replica_id, reflect=False, max_request_bytes=8 << 20, drain_s=20.0)


def _tensors(shelf: TensorShelf) -> Mounted:
    return Mounted(
        lambda server: tensor_pb2_grpc.add_TensorServiceServicer_to_server(TensorServicer(shelf), server),
        "darkroom.v1.TensorService",
    )


def _networks(calls: NetworkCalls) -> Mounted:
    return Mounted(
        lambda server: network_pb2_grpc.add_NetworkServiceServicer_to_server(NetworkServicer(calls), server),
        "darkroom.v1.NetworkService",
    )


def _stages(servicer: StageServicer) -> Mounted:
    return Mounted(
        lambda server: stage_pb2_grpc.add_StageServiceServicer_to_server(servicer, server), "darkroom.v1.StageService"
    )


def _service(
    stage: str,
    replica: StageReplica,
    shelf: TensorShelf,
    source: TensorSource,
    controlnets: ControlNets,
    *,
    cache_bytes: int,
) -> Mounted:
    add: Callable[[grpc.aio.Server], None]
    match stage:
        case "encoder":
            encoder = EncoderServicer(Encoding(replica, EmbeddingCache(limit_bytes=cache_bytes)), shelf)

            def add(server: grpc.aio.Server) -> None:
                encoder_pb2_grpc.add_EncoderServiceServicer_to_server(encoder, server)

        case "denoiser":
            replica.share(controlnets)
            assert replica.send
            ip_adapters = IpAdapters(replica.store, replica.send)
            denoiser = DenoiserServicer(Denoising(replica, source, controlnets, ip_adapters), shelf)

            def add(server: grpc.aio.Server) -> None:
                denoiser_pb2_grpc.add_DenoiserServiceServicer_to_server(denoiser, server)

        case _:
            vae = VaeServicer(Decoding(replica, source))

            def add(server: grpc.aio.Server) -> None:
                vae_pb2_grpc.add_VaeServiceServicer_to_server(vae, server)

    return Mounted(add, f"darkroom.v1.{stage.capitalize()}Service")
