"""What the cache manager can be told."""

from dataclasses import dataclass
from pathlib import Path

from darkroom.runtime.logs import LogLevel
from darkroom.store.opening import DEFAULT_CACHE, DEFAULT_CACHE_BYTES, check_store


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheManagerConfig:
    """Knows which models exist, which replicas are up, and what each holds."""

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
    drain_s: float = 5.0
    """How long running requests may take to finish after SIGTERM, in seconds."""
    reflection: bool = False
    """Whether to serve gRPC reflection."""
    log_level: LogLevel = "info"
    """What is logged at the least."""

    def __post_init__(self) -> None:
        """Raises ValueError."""
        if self.scan_interval_s <= 0:
            raise ValueError(f"scan_interval_s must be positive, not {self.scan_interval_s}")
        if self.drain_s < 0:
            raise ValueError(f"drain_s must not be negative, not {self.drain_s}")
        check_store(self.model_store)
