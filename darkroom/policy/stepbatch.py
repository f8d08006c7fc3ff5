"""Which waiting forwards form the next batch. Pure: no I/O, no clock."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitingForward:
    """A forward that waits for its batch, in order of arrival."""

    key: Hashable
    """Equal for forwards that may share a batch."""
    rows: int
    alone: bool
    """Never shares a batch."""


@dataclass(frozen=True, slots=True)
class StepBatch:
    """Positions, in the order of waiting, of the forwards to run together, and why these."""

    positions: tuple[int, ...]
    reason: str


def choose_batch(waiting: Sequence[WaitingForward], *, max_rows: int) -> StepBatch:
    """The one that has waited longest, and every later one that fits with it.

    No forward starves: each batch takes the oldest, so one waits for at most as many batches as there were older ones.
    A forward of more than `max_rows` rows runs alone.
    """
    if not waiting:
        return StepBatch((), "nothing waits")
    oldest = waiting[0]
    if oldest.alone:
        return StepBatch((0,), "oldest, alone by request")
    chosen, rows = [0], oldest.rows
    for position, forward in enumerate(waiting[1:], start=1):
        if not forward.alone and forward.key == oldest.key and rows + forward.rows <= max_rows:
            chosen.append(position)
            rows += forward.rows
    return StepBatch(tuple(chosen), f"oldest and {len(chosen) - 1} that fit with it")
