"""What every stage process is made of besides its own service: model parts, tensor exchange, membership, the server."""

import functools
import gc
import os
import secrets
import sys
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import structlog
import torch

from darkroom.errors import DarkroomError
from darkroom.models.controlnets import ControlNets
from darkroom.models.networks import Held
from darkroom.models.preparing import Preparations
from darkroom.models.remote import OutsideCall, Reply
from darkroom.models.replica import StageReplica
from darkroom.models.store.model_store import model_store
from darkroom.registry.cache_plan import PlanView
from darkroom.registry.elsewhere import copies_elsewhere
from darkroom.registry.etcd import EtcdRegistry
from darkroom.registry.membership import ClusterView, Registration
from darkroom.registry.port import Member, Rooms
from darkroom.runtime.channels import MAX_MESSAGE_BYTES, Channels
from darkroom.runtime.exchange import TensorServicer, TensorShelf, TensorSource
from darkroom.runtime.following import CopyReporter, PlanFollower
from darkroom.runtime.logs import LogLevel, configure_logs
from darkroom.runtime.networks import NetworkCalls, NetworkServicer
from darkroom.runtime.server import Mounted, Server
from darkroom.runtime.stage_service import StageServicer
from darkroom.store.evicting import Eviction, EvictionKind
from darkroom.store.opening import DEFAULT_CACHE, DEFAULT_CACHE_BYTES, check_store, is_url, open_source
from darkroom.v1 import network_pb2, network_pb2_grpc, stage_pb2, stage_pb2_grpc, tensor_pb2, tensor_pb2_grpc

_log = structlog.get_logger()
_UNASKED_SHARE = 16
"""Of memory without a bound: several stage processes may share it."""
_BOUNDED_SHARE = 0.8
"""Of a GPU's memory, where no bound is set: batches and what torch keeps for them need the rest."""
_SWITCH_INTERVAL_S = 1e-4
"""How long one thread may keep others from Python: a LoRA or model being read beside them costs steps least so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageConfig:
    """What all stage services can be told."""

    address: str = "127.0.0.1:0"
    """`host:port` to listen on; port 0 takes a free one."""
    advertise_host: str = "127.0.0.1"
    """Host under which other services reach this one."""
    etcd: tuple[str, ...] = ("127.0.0.1:2379",)
    """etcd endpoints, comma-separated."""
    model_store: str | Path = "models"
    """Folder of models in diffusers' directory format; or the URL of one with an index: http, https, s3 or file."""
    store_cache: Path = DEFAULT_CACHE
    """Folder on this node's SSD for what comes from a store's URL. All processes of the node use the same one."""
    store_cache_bytes: int = DEFAULT_CACHE_BYTES
    """Bound of that folder. Room for a dozen large models."""
    pool_bytes: int = 0
    """Memory made ready at the start to read weights into, in blocks of five sizes. 0 makes it as it is needed."""
    host_cache_bytes: int = 4 << 30
    """Weights files kept in memory after their models left the device. On a CPU, loaded models use the same bytes."""
    device_budget_bytes: int | None = None
    """Weights on the device at once: idle models leave it for others. 0 keeps all that was ever loaded, and then only
    a sixteenth of the memory is filled with what no request has asked for. Not set: 80 % of a GPU's memory; 0 on a CPU.
    Processes that share a GPU know nothing of each other: tell each its part."""
    eviction: EvictionKind = "worth"
    """What leaves the disk, host memory and device first: what costs requests least, or what was used longest ago."""
    preload: tuple[str, ...] = ()
    """Models to load at the start, comma-separated; others are loaded on first use."""
    device: str = "cpu"
    """torch device of the networks."""
    threads: int = 1
    """torch threads. On shared CPUs one thread each beats several: waiting threads spin."""
    max_running: int = 64
    """Requests accepted at once; more are refused with QUEUE_FULL."""
    slots: int = 32
    """Requests on the device at once; others wait, and urgent ones push out those with time to spare."""
    max_batch_rows: int = 32
    """Rows of the largest batch. Past 16 a small UNet's step grows linearly on the CPUs measured."""
    lora_bytes: int = 2 << 30
    """Bytes of the LoRAs that are held at once for one model, or for one with certain IP-Adapters."""
    shelf_bytes: int = 256 << 20
    """Bytes of tensors held for other stages."""
    inline_limit_bytes: int = 1 << 20
    """Tensors up to this size travel by value."""
    drain_s: float = 30.0
    """How long running requests may take to finish after SIGTERM, in seconds."""
    reflection: bool = False
    """Whether to serve gRPC reflection."""
    log_level: LogLevel = "info"
    """What is logged at the least."""

    def __post_init__(self) -> None:
        """Raises ValueError."""
        for name in ("threads", "max_running", "slots", "max_batch_rows", "shelf_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("store_cache_bytes", "pool_bytes", "host_cache_bytes", "device_budget_bytes"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)}")
        if not 0 <= self.inline_limit_bytes <= 1 << 20:
            raise ValueError(f"inline_limit_bytes must be 0 to {1 << 20}, not {self.inline_limit_bytes}")
        if self.drain_s < 0:
            raise ValueError(f"drain_s must not be negative, not {self.drain_s}")
        check_store(self.model_store)


def memory_of(device: str) -> int:
    """Bytes of a torch device's memory."""
    if device.startswith("cuda"):
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def budget_of(config: StageConfig, memory_bytes: int) -> int:
    """Bound of the weights on a device with so much memory; 0 for none."""
    if config.device_budget_bytes is not None:
        return config.device_budget_bytes
    return int(_BOUNDED_SHARE * memory_bytes) if config.device.startswith("cuda") else 0


def rooms_of(config: StageConfig, budget_bytes: int) -> Rooms:
    """How much a replica can hold of what requests have not asked it for."""
    return Rooms(
        device_bytes=budget_bytes or memory_of(config.device) // _UNASKED_SHARE,
        host_bytes=config.host_cache_bytes,
        disk_bytes=config.store_cache_bytes if is_url(config.model_store) else None,
        evicts=budget_bytes > 0,
    )


class StageProcess:
    """The parts that a stage's own service is built upon; `run` serves until SIGTERM."""

    def __init__(self, stage: str, config: StageConfig) -> None:
        """Builds everything and connects to nothing yet."""
        self.config = config
        sys.setswitchinterval(_SWITCH_INTERVAL_S)
        replica_id = f"{stage}-{secrets.token_hex(4)}"
        configure_logs(stage, replica_id, level=config.log_level)
        self._registry = EtcdRegistry(config.etcd)
        self._view = ClusterView(self._registry)
        self._channels = Channels()
        self._server = Server(
            address=config.address,
            replica_id=replica_id,
            reflect=config.reflection,
            max_request_bytes=MAX_MESSAGE_BYTES,
            drain_s=config.drain_s,
        )
        self.shelf = TensorShelf(limit_bytes=config.shelf_bytes, inline_limit_bytes=config.inline_limit_bytes)
        self.shelf.address = f"{config.advertise_host}:{self._server.port}"
        self.source = TensorSource(self._channels, self.shelf, lambda: {m.address for m in self._view.members()})
        eviction = Eviction(config.eviction)
        budget_bytes = budget_of(config, memory_of(config.device))
        self.store = model_store(
            open_source(config.model_store, config.store_cache, config.store_cache_bytes, eviction=eviction),
            device=config.device,
            pool_bytes=config.pool_bytes,
            host_cache_bytes=config.host_cache_bytes,
            eviction=eviction,
        )
        self.replica = StageReplica(
            replica_id=replica_id,
            stage=stage,
            model_store=self.store,
            device=config.device,
            max_running=config.max_running,
            max_batch_rows=config.max_batch_rows,
            thread_count=config.threads,
            slot_count=config.slots,
            max_lora_bytes=config.lora_bytes,
            device_budget_bytes=budget_bytes,
        )
        self.rooms = rooms_of(config, budget_bytes)
        member = Member(
            replica_id=replica_id,
            stage=stage,
            address=self.shelf.address,
            device=config.device,
            rooms=self.rooms,
        )
        self._registration = Registration(self._registry, member)
        self._plans = PlanView(self._registry)
        elsewhere = functools.partial(copies_elsewhere, self._view, member)
        is_apart = config.device.startswith("cuda")
        self._follower = PlanFollower(replica_id, stage, self.replica, self._plans, elsewhere, is_apart=is_apart)
        is_remote = is_url(config.model_store)  # else all of the store lies on this machine's disk
        self._reporter = CopyReporter(
            self.replica,
            lambda: [entry.model_id for entry in self._view.models()] if is_remote else (),
            self._registration.set_residences,
            tells_disk=is_remote,
            problems=lambda: self._follower.problems,
        )

    def send(self, stage: str, call: OutsideCall) -> "Future[Reply]":
        """Calls a network at a replica of another stage; once this one serves."""
        assert self.replica.send is not None
        return self.replica.send(stage, call)

    async def run(
        self,
        service: Mounted,
        *,
        held: Callable[[str], Awaitable[Held]] | None = None,
        controlnets: ControlNets | None = None,
    ) -> None:
        """Serves `service` beside what all stages serve. Loads the preloaded models before registering.

        `held` gets what other replicas call, by model id; None means the replica's parts of models. `controlnets`:
        those that the service's requests use.
        """
        await self._run([service], held or self.replica.part, controlnets)

    async def run_for_others(self, controlnets: ControlNets) -> None:
        """Serves the networks of ControlNets to denoisers, and what all stages serve."""
        self.replica.share(controlnets)
        await self._run([], controlnets.get)

    async def _run(
        self,
        services: Sequence[Mounted],
        held: Callable[[str], Awaitable[Held]],
        controlnets: ControlNets | None = None,
    ) -> None:
        self.replica.on_loaded = self._reporter.changed
        calls = NetworkCalls(self.replica, self._view, self._channels, self.shelf, self.source, held=held)
        self.replica.send = calls.send
        preparations = Preparations(self.replica, held, controlnets)
        common = [
            Mounted(
                lambda server: stage_pb2_grpc.add_StageServiceServicer_to_server(
                    StageServicer(self.replica, preparations, lambda: self._server.is_draining), server
                ),
                _name(stage_pb2, "StageService"),
            ),
            Mounted(
                lambda server: network_pb2_grpc.add_NetworkServiceServicer_to_server(NetworkServicer(calls), server),
                _name(network_pb2, "NetworkService"),
            ),
            Mounted(
                lambda server: tensor_pb2_grpc.add_TensorServiceServicer_to_server(TensorServicer(self.shelf), server),
                _name(tensor_pb2, "TensorService"),
            ),
        ]
        gc.freeze()  # what imports made stays: looking it through stops every step for half a second
        gc.enable()
        await self._preload(self.config.preload, held)
        await self._server.start([*services, *common])
        background = [
            self._registration.run(),
            self._view.run(),
            self._channels.follow(self._view),
            self.replica.watch(),
            self._plans.run(),
            self._follower.run(),
            self._reporter.run(),
        ]
        await self._server.run(background, on_drain=[self._registration.leave, preparations.end, self._hand_back])
        await self._channels.close()
        await self._registry.close()
        self.replica.close()

    async def _hand_back(self) -> None:
        """Hands requests back where another replica can take them; else they finish here within the grace."""
        if self._view.members(self.replica.stage):
            self.replica.hand_back()

    async def _preload(self, model_ids: Sequence[str], held: Callable[[str], Awaitable[Held]]) -> None:
        for model_id in model_ids:
            try:
                await held(model_id)
            except DarkroomError as error:
                _log.error("preload_failed", model_id=model_id, reason=error.reason(), problem=error.message)


def _name(module: object, service: str) -> str:
    descriptor = module.DESCRIPTOR  # type: ignore[attr-defined]
    return str(descriptor.services_by_name[service].full_name)
