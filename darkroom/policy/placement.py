"""Which replica runs a node. Pure: no I/O, no clock."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaLoad:
    """A replica as the router sees it."""

    replica_id: str
    running_count: int
    """Requests this router has sent there and not got back."""
    holds_model: bool
    """Whether it has loaded the model that the node needs."""
    is_suspect: bool
    """Whether a call to it failed a moment ago."""


@dataclass(frozen=True, slots=True)
class Placement:
    """The replica to call, and why this one."""

    replica_id: str
    reason: str


def choose_replica(replicas: Sequence[ReplicaLoad], *, tried: Collection[str] = ()) -> Placement | None:
    """The least loaded replica not tried yet; None when all were.

    Suspects come last. Among equals one that holds the model wins, then the smallest id.
    """
    left = [replica for replica in replicas if replica.replica_id not in tried]
    if not left:
        return None
    best = min(left, key=lambda r: (r.is_suspect, r.running_count, not r.holds_model, r.replica_id))
    held = "holds the model" if best.holds_model else "must load the model"
    suspect = ", suspect" if best.is_suspect else ""
    return Placement(best.replica_id, f"least load of {len(left)}: {best.running_count} running, {held}{suspect}")
