"""What the router can be told."""

from dataclasses import dataclass

from darkroom.runtime.logs import LogLevel


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig:
    """Takes requests and composes the stages for each."""

    address: str = "127.0.0.1:7600"
    """`host:port` to listen on; port 0 takes a free one."""
    advertise_host: str = "127.0.0.1"
    """Host under which other services reach this one."""
    etcd: tuple[str, ...] = ("127.0.0.1:2379",)
    """etcd endpoints, comma-separated."""
    default_model: str = "shapes"
    """The model of requests that name none."""
    default_deadline_s: float = 300.0
    """How long a request without a deadline may take, in seconds."""
    replica_wait_s: float = 20.0
    """How long a request waits for a replica to appear when a stage has none: a stage process starts in about 10 s."""
    max_running: int = 256
    """Requests accepted at once; more are refused with QUEUE_FULL."""
    prepares_stages: bool = True
    """Whether the later stages of a request load its model while the earlier ones run. Off loads it stage after stage:
    for benchmarks."""
    drain_s: float = 30.0
    """How long running requests may take to finish after SIGTERM, in seconds."""
    reflection: bool = False
    """Whether to serve gRPC reflection."""
    log_level: LogLevel = "info"
    """What is logged at the least."""

    def __post_init__(self) -> None:
        """Raises ValueError."""
        for name in ("default_deadline_s", "max_running"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        for name in ("replica_wait_s", "drain_s"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)}")
