"""Other orders of forwards than `policy/stepbatch`, for the same executor: substitutes for its choice of batches."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeAlias

from bench.stepbatch_mix import Wanted
from darkroom.policy.stepbatch import StepBatch, WaitingForward

Choose: TypeAlias = Callable[..., StepBatch]
"""As `choose_batch`; what an order does not look at, it ignores."""
Kind: TypeAlias = Callable[[WaitingForward], Hashable]


class WholeRequests:
    """Dynamic batching of requests: a batch forms when the last one is done, and nobody joins it under way.

    It forms without delay from what waits, the oldest request first. All of its members run a step together; one that
    is done leaves.
    """

    def __init__(self, kind: Kind) -> None:
        """Requests of equal `kind` may share a batch, if their forwards can."""
        self._kind = kind
        self._batch: set[str] = set()

    def __call__(self, waiting: Sequence[WaitingForward], *, max_rows: int, **_: Any) -> StepBatch:
        """Positions of the batch."""
        staying = [place for place, forward in enumerate(waiting) if forward.request_id in self._batch]
        if not staying:
            oldest = min(range(len(waiting)), key=lambda place: waiting[place].arrived_s or 0.0)
            staying = _with_company(waiting, oldest, max_rows, self._kind)
            self._batch = {waiting[place].request_id for place in staying}
        return StepBatch(tuple(staying), "whole requests")


def oldest_forward(waiting: Sequence[WaitingForward], *, max_rows: int, **_: Any) -> StepBatch:
    """The forward that waited longest leads, and takes along what fits with it."""
    order = sorted(range(len(waiting)), key=lambda place: waiting[place].waiting_since_s)
    return StepBatch(tuple(_with_company(waiting, order[0], max_rows, order=order)), "oldest first")


def largest_group(waiting: Sequence[WaitingForward], *, max_rows: int, **_: Any) -> StepBatch:
    """The key with most rows waiting."""
    rows: dict[Hashable, int] = {}
    for forward in waiting:
        rows[forward.key] = rows.get(forward.key, 0) + forward.rows
    most = max(rows, key=rows.__getitem__)
    lead = next(place for place, forward in enumerate(waiting) if forward.key == most)
    return StepBatch(tuple(_with_company(waiting, lead, max_rows)), "largest first")


def _with_company(
    waiting: Sequence[WaitingForward],
    lead: int,
    max_rows: int,
    kind: Kind = lambda forward: forward.key,
    order: Sequence[int] = (),
) -> list[int]:
    first = waiting[lead]
    chosen, rows = [lead], first.rows
    for place in order or range(len(waiting)):
        forward = waiting[place]
        is_company = place != lead and forward.key == first.key and kind(forward) == kind(first)
        if is_company and rows + forward.rows <= max_rows:
            chosen.append(place)
            rows += forward.rows
    return chosen


def other_orders(requests: Mapping[str, Wanted]) -> dict[str, Choose]:
    """By the side's name. `requests`: by id, those that run, for what a waiting forward does not say."""

    def strictly(forward: WaitingForward) -> Hashable:
        wanted = requests[forward.request_id]
        return (forward.key, wanted.step_count, wanted.scheduler)

    return {
        "requests, strict": WholeRequests(strictly),
        "requests": WholeRequests(lambda forward: forward.key),
        "oldest first": oldest_forward,
        "largest first": largest_group,
    }
