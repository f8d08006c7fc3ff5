"""Which replica runs a node of a request's graph. Pure: no I/O, no clock."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A replica, and what the router expects of it for one request. Seconds from now."""

    replica_id: str
    queue_s: float = 0.0
    """Until the requests that it has leave room for this one."""
    prepare_s: float = 0.0
    """Until the model is ready to move to the device, which happens beside the queue: its load from disk or afar."""
    swap_s: float = 0.0
    """Until the model is on the device, once the queue is done."""
    run_s: float = 0.0
    """Of the request itself, beside those that run there."""
    displaced_s: float = 0.0
    """What later requests lose by what the model pushes out."""
    is_suspect: bool = False
    """Whether a call to it failed a moment ago."""

    @property
    def load_s(self) -> float:
        """What loading takes."""
        return self.prepare_s + self.swap_s

    @property
    def finish_s(self) -> float:
        """When the answer is expected."""
        return max(self.queue_s, self.prepare_s) + self.swap_s + self.run_s


@dataclass(frozen=True, slots=True)
class Placement:
    """The replica to call, and why this one."""

    replica_id: str
    finish_s: float
    reason: str


def choose_replica(candidates: Sequence[Candidate], *, tried: Collection[str] = ()) -> Placement | None:
    """The one that answers first, what later requests lose counted in; None when all were tried.

    Suspects come last. Among equals the one that loads least wins, then the smallest id.
    """
    left = [candidate for candidate in candidates if candidate.replica_id not in tried]
    if not left:
        return None
    best = min(left, key=lambda c: (c.is_suspect, c.finish_s + c.displaced_s, c.load_s, c.replica_id))
    loads = f", loads for {best.load_s:.1f} s" if best.load_s else ""
    suspect = ", suspect" if best.is_suspect else ""
    reason = f"best of {len(left)}: done in {best.finish_s:.1f} s, waits {best.queue_s:.1f} s{loads}{suspect}"
    return Placement(best.replica_id, best.finish_s, reason)
