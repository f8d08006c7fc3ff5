"""A whole cluster on this machine: etcd and every service as a process of its own, supervised."""

import asyncio
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

import grpc

from darkroom.policy.fusion import MOST_PAIRS
from darkroom.runtime.channels import Channels
from darkroom.runtime.forking import Zygote
from darkroom.runtime.processes import Child, Launch, Supervisor, etcd_program, execute, free_port
from darkroom.store.evicting import EvictionKind
from darkroom.store.opening import absolute, check_store
from darkroom.v1 import cachemgr_pb2, cachemgr_pb2_grpc, stage_pb2

_POLL_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    """What a local cluster consists of."""

    encoders: int = 1
    """Encoder replicas."""
    denoisers: int = 2
    """Denoiser replicas. On a CPU two of one thread each beat one of two threads."""
    vaes: int = 1
    """VAE replicas."""
    routers: int = 1
    """Routers. Each takes requests; they share nothing but the registry."""
    cachemgrs: int = 1
    """Cache managers. One leads; the others take over when it dies."""
    device: str = "cpu"
    """torch device of every stage, for example `cuda:0`."""
    threads: int = 1
    """torch threads of every stage process."""
    model_store: str | Path = "models"
    """Folder of models in diffusers' directory format; or the URL of one with an index."""
    store_cache: Path | None = None
    """Folder for what comes from a store's URL. None leaves this, as the next six, to the services' own settings."""
    store_cache_bytes: int | None = None
    """Bound of that folder."""
    host_cache_bytes: int | None = None
    """Weights files kept in each stage's memory after their models left the device."""
    pool_bytes: int | None = None
    """Memory that each stage makes ready at its start to read into."""
    device_budget_bytes: int | None = None
    """Weights on each stage's device at once; 0 for no bound."""
    eviction: EvictionKind | None = None
    """What leaves a stage's tiers first: what costs requests least, or what was used longest ago."""
    hour_prefetch: bool | None = None
    """Whether the cache manager brings warm models near by the hour of the day."""
    merged_pairs: int | None = None
    """Pairs of a model and LoRAs that each denoiser keeps merged, at most."""
    preload: tuple[str, ...] = ()
    """Models that every stage loads before it takes requests."""
    default_model: str = "shapes"
    """The model of requests that name none."""
    router_port: int = 0
    """Port of the first router on 127.0.0.1; 0 takes a free one, as the others do."""
    reflection: bool = False
    """Whether the services answer gRPC reflection."""
    inline_limit_bytes: int = 1 << 20
    """Tensors up to this size travel by value between the stages."""
    log_folder: Path | None = None
    """Where each process writes its log; None means a folder that goes with the cluster."""
    start_timeout_s: float = 120.0
    """How long everything together may take to become ready."""

    def __post_init__(self) -> None:
        """Raises ValueError."""
        for name in ("encoders", "denoisers", "vaes", "routers", "cachemgrs", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("store_cache_bytes", "host_cache_bytes", "pool_bytes", "device_budget_bytes"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)}")
        if not 0 <= (self.merged_pairs or 0) <= MOST_PAIRS:
            raise ValueError(f"merged_pairs must be 0 to {MOST_PAIRS}, not {self.merged_pairs}")
        check_store(self.model_store)


def store_flags(config: ClusterConfig) -> list[str]:
    """What every process is told that reads the model store: what was asked for. Their environment says the rest."""
    return _flags(
        {
            "--model-store": absolute(config.model_store),
            "--store-cache": config.store_cache and config.store_cache.expanduser(),
            "--store-cache-bytes": config.store_cache_bytes,
        }
    )


def stage_flags(config: ClusterConfig) -> list[str]:
    """What every stage is told, in the same way."""
    asked = {
        "--device": config.device,
        "--threads": config.threads,
        "--inline-limit-bytes": config.inline_limit_bytes,
        "--host-cache-bytes": config.host_cache_bytes,
        "--pool-bytes": config.pool_bytes,
        "--device-budget-bytes": config.device_budget_bytes,
        "--eviction": config.eviction,
        "--preload": ",".join(config.preload) or None,
    }
    return [*store_flags(config), *_flags(asked)]


def cachemgr_flags(config: ClusterConfig) -> list[str]:
    """What every cache manager is told, in the same way."""
    return [*store_flags(config), *_flags({"--hour-prefetch": config.hour_prefetch})]


def denoiser_flags(config: ClusterConfig) -> list[str]:
    """What every denoiser is told, in the same way."""
    return [*stage_flags(config), *_flags({"--merged-pairs": config.merged_pairs})]


def _flags(asked: Mapping[str, object]) -> list[str]:
    return [word for flag, value in asked.items() if value is not None for word in (flag, str(value))]


@dataclass(frozen=True, slots=True, kw_only=True)
class Addresses:
    """Where a running cluster is reached, and the process that owns it."""

    router: str
    other_routers: list[str]
    cachemgr: str
    etcd: str
    owner_pid: int


class LocalCluster:
    """Starts on entry, and stops whatever it has started on exit, however the body ends."""

    def __init__(
        self, config: ClusterConfig, *, on_death: Callable[[str, int], None] = lambda _name, _code: None
    ) -> None:
        """`on_death` hears of every process that died and is started again."""
        self._config = config
        self._folder = tempfile.TemporaryDirectory(prefix="darkroom-")
        self.log_folder = config.log_folder or Path(self._folder.name) / "logs"
        self._supervisor = Supervisor(on_death)
        threads = str(config.threads)
        self._environment = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
        stages = [f"services.{stage}" for stage in self._counts()]
        self._zygote = Zygote(stages, self.log_folder / "zygote.log", self._environment)
        self.addresses = Addresses(
            router=f"127.0.0.1:{config.router_port or free_port()}",
            other_routers=[f"127.0.0.1:{free_port()}" for _ in range(1, config.routers)],
            cachemgr=f"127.0.0.1:{free_port()}",
            etcd=f"127.0.0.1:{free_port()}",
            owner_pid=os.getpid(),
        )

    async def __aenter__(self) -> Self:
        """The cluster, ready for requests. Raises ChildFailed or TimeoutError."""
        try:
            async with asyncio.timeout(self._config.start_timeout_s):
                await self._start()
                await self._wait_until_ready()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stops everything."""
        await self.stop()

    async def stop(self) -> None:
        """Ends every process and removes the cluster's folder."""
        await asyncio.shield(self._supervisor.stop())
        await asyncio.shield(self._zygote.stop())
        self._folder.cleanup()

    def child(self, name: str) -> Child:
        """A process by name, such as `denoiser-1`."""
        return next(child for child in self._supervisor.children if child.name == name)

    @property
    def children(self) -> list[Child]:
        """All processes, etcd first."""
        return self._supervisor.children

    async def _start(self) -> None:
        await self._supervisor.add(self._etcd())
        config = self._config
        cachemgr, stage = cachemgr_flags(config), stage_flags(config)
        flags = {"encoder": stage, "denoiser": denoiser_flags(config), "vae": stage}
        await self._add_service("cachemgr", "cachemgr", ["--address", self.addresses.cachemgr, *cachemgr])
        for number in range(2, config.cachemgrs + 1):
            await self._add_service(f"cachemgr-{number}", "cachemgr", ["--address", "127.0.0.1:0", *cachemgr])
        for number, address in enumerate([self.addresses.router, *self.addresses.other_routers], 1):
            name = f"router-{number}" if number > 1 else "router"
            await self._add_service(name, "router", ["--address", address, "--default-model", config.default_model])
        for service, count in self._counts().items():
            for number in range(1, count + 1):
                await self._add_service(f"{service}-{number}", service, flags[service])

    def _counts(self) -> dict[str, int]:
        return {"encoder": self._config.encoders, "denoiser": self._config.denoisers, "vae": self._config.vaes}

    def _etcd(self) -> Child:
        peer = f"http://127.0.0.1:{free_port()}"
        client = f"http://{self.addresses.etcd}"
        command = [
            etcd_program(),
            "--name",
            "local",
            "--data-dir",
            str(Path(self._folder.name) / "etcd"),
            "--log-level",
            "warn",
            "--listen-client-urls",
            client,
            "--advertise-client-urls",
            client,
            "--listen-peer-urls",
            peer,
            "--initial-advertise-peer-urls",
            peer,
            "--initial-cluster",
            f"local={peer}",
            "--unsafe-no-fsync",
        ]
        log = self.log_folder / "etcd.log"
        return Child("etcd", log, partial(execute, command, log))

    async def _add_service(self, name: str, service: str, flags: list[str]) -> None:
        reflection = ["--reflection", "true"] if self._config.reflection else []
        module, arguments = f"services.{service}", ["--etcd", self.addresses.etcd, *flags, *reflection]
        log = self.log_folder / f"{name}.log"
        launch: Launch
        if service in self._counts() and self._config.device == "cpu":  # CUDA after a fork was not tried yet
            launch = partial(self._zygote.fork, name, module, arguments, log)
        else:
            launch = partial(execute, [sys.executable, "-m", module, *arguments], log, self._environment)
        await self._supervisor.add(Child(name, log, launch))

    async def _wait_until_ready(self) -> None:
        """Until the cache manager lists every stage replica, and the routers answer."""
        channels = Channels()
        try:
            stub = cachemgr_pb2_grpc.CacheManagerServiceStub(channels.to(self.addresses.cachemgr))
            while not await self._is_complete(stub):
                self._supervisor.check()
                await asyncio.sleep(_POLL_S)
            for router in (self.addresses.router, *self.addresses.other_routers):
                await channels.to(router).channel_ready()
        finally:
            await channels.close()

    async def _is_complete(self, stub: cachemgr_pb2_grpc.CacheManagerServiceStub) -> bool:
        try:
            models = await stub.ListModels(cachemgr_pb2.ListModelsRequest(), timeout=1.0)
            cache = await stub.DescribeCache(cachemgr_pb2.DescribeCacheRequest(), timeout=1.0)
        except grpc.aio.AioRpcError:
            return False  # not up yet
        up = Counter(stage_pb2.Stage.Name(replica.stage).removeprefix("STAGE_").lower() for replica in cache.replicas)
        return bool(models.models) and all(up[stage] >= count for stage, count in self._counts().items())


def state_file() -> Path:
    """Where `darkroom up` notes its addresses for other commands of the same user."""
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "darkroom" / "cluster.json"


def write_state(addresses: Addresses) -> None:
    """Notes a running cluster."""
    file = state_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(asdict(addresses)))
    partial.replace(file)


def read_state() -> Addresses | None:
    """The cluster that this user has up, if its owner is alive."""
    try:
        addresses = Addresses(**json.loads(state_file().read_text()))
        os.kill(addresses.owner_pid, 0)
    except (OSError, ValueError, TypeError):
        return None
    return addresses


def clear_state(addresses: Addresses) -> None:
    """Forgets the cluster, unless another has been noted since."""
    if read_state() == addresses:
        state_file().unlink(missing_ok=True)
