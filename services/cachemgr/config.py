"""What the cache manager can be told."""

from dataclasses import dataclass
from pathlib import Path

from darkroom.runtime.logs import LogLevel
from darkroom.store.opening import DEFAULT_CACHE, DEFAULT_CACHE_BYTES, check_store

_SPEEDS = ("network_bytes_per_s", "disk_bytes_per_s", "bus_bytes_per_s")
_MAX_LEASE_S = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheManagerConfig:
    """Knows which models exist, which replicas are up, and what each holds; plans what they should hold."""

    address: str = "127.0.0.1:7601"
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
    scan_interval_s: float = 5.0
    """How often the model store is read for new and vanished models, in seconds."""
    plan_interval_s: float = 5.0
    """How often the leader looks whether the plan should change, in seconds; a wish makes it look at once."""
    popularity_interval_s: float = 30.0
    """How often the leader keeps what is asked for in the registry, for when all cache managers were down."""
    hour_prefetch: bool = False
    """Whether the hour of the day brings warm models near before anybody asks: what was of use at this hour before, and
    what was not tried yet. Off, for on a production trace it moved bytes and saved nothing."""
    lease_s: int = 5
    """How long a dead leader is still taken for one, in seconds; at least 1.5 of etcd's election timeouts."""
    network_bytes_per_s: float = 0.25e9
    """What a machine gets from the model store. A guess: the plan needs the order of magnitude."""
    disk_bytes_per_s: float = 0.5e9
    """What a load reads from disk, networks being built included, until replicas have said what theirs took."""
    bus_bytes_per_s: float = 10e9
    """What goes from memory to a device: PCIe 4, with some to spare."""
    drain_s: float = 5.0
    """How long running requests may take to finish after SIGTERM, in seconds."""
    reflection: bool = False
    """Whether to serve gRPC reflection."""
    log_level: LogLevel = "info"
    """What is logged at the least."""

    def __post_init__(self) -> None:
        """Raises ValueError."""
        for name in ("scan_interval_s", "plan_interval_s", "popularity_interval_s", *_SPEEDS):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        if not 1 <= self.lease_s <= _MAX_LEASE_S:
            raise ValueError(f"lease_s must be 1 to {_MAX_LEASE_S}, not {self.lease_s}")
        if self.drain_s < 0:
            raise ValueError(f"drain_s must not be negative, not {self.drain_s}")
        check_store(self.model_store)
