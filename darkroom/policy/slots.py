"""Which requests hold a slot of the device, which wait, and who is pushed out to resume later. Pure: no I/O, no clock.

A slot holds a request's working memory. Whoever is pushed out leaves a checkpoint in host memory and loses only its
place, so it is done rarely: for a deadline that is met by it and lost without it, never at the cost of another one.

Those that wait come in this order: older than the patience, oldest first (nobody starves); priority; deadlines that
could be lost by waiting for a slot and can still be met, least slack first; tenants that hold fewest slots; age.
"""

import heapq
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

PATIENCE_S = 60.0
"""Age past which a waiting request goes before every younger one."""
MARGIN_S = 0.5
"""Slack that must be left over on either side of a swap: predictions are wrong, and a swap must not be undone."""
SWAP_S = 0.05
"""Seconds that pushing out and resuming cost the one it happens to: a checkpoint there and back, a step at most."""
MAX_PUSH_OUTS = 3
"""Times that one request is pushed out, at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotRequest:
    """A request that holds a slot or waits for one. Times are on one clock, in seconds."""

    request_id: str
    remaining_s: float
    """Predicted seconds to its end, once it has a slot."""
    deadline_s: float = math.inf
    priority: int = 0
    """The larger goes first."""
    tenant: str = ""
    waiting_since_s: float = 0.0
    """When it came; one that was pushed out keeps its age."""
    is_restartable: bool = False
    """Whether it can be pushed out and go on later where it was."""
    pushed_out_count: int = 0

    def slack_s(self, now_s: float) -> float:
        """Seconds it may lose and still meet its deadline; negative when it will miss it, inf without one."""
        return self.deadline_s - now_s - self.remaining_s


@dataclass(frozen=True, slots=True)
class SlotChoice:
    """Positions among the waiting that start now, in order, those among the resident pushed out first, and why."""

    start: tuple[int, ...]
    push_out: tuple[int, ...]
    reason: str


def choose_slots(
    waiting: Sequence[SlotRequest], resident: Sequence[SlotRequest], *, slot_count: int, now_s: float
) -> SlotChoice:
    """Fills free slots in order, then swaps for deadlines that only a swap can save.

    One is pushed out only for one whose deadline it saves, if it has no deadline it could meet or meets its own after
    waiting for the other to end; if the other has less slack by `MARGIN_S`, is of no lower class, and it has not been
    pushed out `MAX_PUSH_OUTS` times. A swap is undone by its own two, if at all, after 2 × `MARGIN_S`: slack stays as
    it is while a request runs and falls while it waits, and it takes that long for their order to turn round; sooner
    only if the one that came in has lost its deadline since. Equals go in order of position.
    """
    order = _line(waiting, resident, now_s)
    free_count = max(0, slot_count - len(resident))
    start, push_out = order[:free_count], _swaps(waiting, resident, order, free_count, now_s)
    savers = list(push_out)
    return SlotChoice(tuple(start + savers), tuple(push_out.values()), _reason(waiting, resident, len(start), push_out))


def _swaps(
    waiting: Sequence[SlotRequest], resident: Sequence[SlotRequest], order: list[int], free_count: int, now_s: float
) -> dict[int, int]:
    """Whom each of those in line without a free slot pushes out: positions among the waiting and the resident."""
    holders = (*resident, *(waiting[position] for position in order[:free_count]))
    free_at = [(holder.remaining_s, slot) for slot, holder in enumerate(holders)]
    """A heap of when each slot falls free; those in line are taken to get the earliest, each in turn."""
    heapq.heapify(free_at)
    longest_s = _longest_s(resident)
    swaps: dict[int, int] = {}
    for position in order[free_count:] if free_at else ():
        arrival = waiting[position]
        wait_s, slot = free_at[0]
        victim = None
        if arrival.slack_s(now_s) < wait_s and _is_at_risk(arrival, longest_s, now_s):
            victim = _victim(arrival, resident, set(swaps.values()), now_s)
        if victim is None:
            heapq.heapreplace(free_at, (wait_s + arrival.remaining_s, slot))
            continue
        swaps[position] = victim
        saved_s = resident[victim].remaining_s - arrival.remaining_s
        free_at = [(at_s - saved_s if slot == victim else at_s, slot) for at_s, slot in free_at]
        heapq.heapify(free_at)
    return swaps


def _line(waiting: Sequence[SlotRequest], resident: Sequence[SlotRequest], now_s: float) -> list[int]:
    """Positions of those that wait, in the order in which they get slots."""
    held = Counter(request.tenant for request in resident)
    longest_s = _longest_s(resident)
    keyed: list[tuple[tuple[float, int, float, float], int]] = []
    by_age = sorted(range(len(waiting)), key=lambda position: (waiting[position].waiting_since_s, position))
    for position in by_age:
        request = waiting[position]
        if request.waiting_since_s <= now_s - PATIENCE_S:
            keyed.append(((-math.inf, 0, 0.0, request.waiting_since_s), position))
        elif _is_at_risk(request, longest_s, now_s):
            keyed.append(((-request.priority, 0, 0.0, request.slack_s(now_s)), position))
        else:
            # As if those of the tenant ahead of it in the line had their slots already: tenants take turns.
            keyed.append(((-request.priority, 1, held[request.tenant], request.waiting_since_s), position))
        held[request.tenant] += 1
    return [position for _, position in sorted(keyed)]


def _longest_s(resident: Sequence[SlotRequest]) -> float:
    """Seconds until every resident has ended."""
    return max((holder.remaining_s for holder in resident), default=0.0)


def _is_at_risk(request: SlotRequest, longest_s: float, now_s: float) -> bool:
    """Whether its deadline can be met, but perhaps not by waiting until every resident has ended."""
    if request.deadline_s == math.inf:
        return False
    return SWAP_S <= request.slack_s(now_s) <= request.remaining_s + longest_s


def _victim(arrival: SlotRequest, resident: Sequence[SlotRequest], taken: set[int], now_s: float) -> int | None:
    """The resident that loses least by making room, None if nobody can: lowest class, most slack, most left to do."""
    best: tuple[tuple[float, float, float, int], int] | None = None
    arrival_slack_s = arrival.slack_s(now_s)
    for position, request in enumerate(resident):
        if position in taken or not request.is_restartable or request.priority > arrival.priority:
            continue
        if request.pushed_out_count >= MAX_PUSH_OUTS:
            continue
        slack_s = request.slack_s(now_s)
        if slack_s < 0.0:
            slack_s = math.inf  # its deadline is lost either way
        if slack_s < max(arrival.remaining_s + 2 * SWAP_S, arrival_slack_s) + MARGIN_S:
            continue
        rank = (request.priority, -slack_s, -request.remaining_s, position)
        if best is None or rank < best[0]:
            best = (rank, position)
    return None if best is None else best[1]


def _reason(
    waiting: Sequence[SlotRequest], resident: Sequence[SlotRequest], filled_count: int, swaps: Mapping[int, int]
) -> str:
    parts = [f"{filled_count} of {len(waiting)} into free slots"] if filled_count else []
    for saver, victim in swaps.items():
        parts.append(f"{waiting[saver].request_id} for its deadline in place of {resident[victim].request_id}")
    return "; ".join(parts) or ("slots are full" if waiting else "nothing waits")
