"""Which waiting forwards form the next batch. Pure: no I/O, no clock.

A batch is led by one forward and filled with company of its key. Who leads, in this order:

1. Requests older than the patience, oldest first. So nobody starves: past that age a request gives way only to those
   that came before it, whatever arrives later.
2. The highest priority class.
3. Requests whose deadline is at risk but can be met, least slack first. A lost deadline earns no preference: it would
   only make the next one late as well.
4. Tenants that are not ahead of the least served one, as in Virtual Token Counter (Sheng et al., OSDI 2024), with
   seconds for tokens, and loosened by `FAIR_WITHIN_S`, so that requests are not interrupted at each step.
5. The least arrival + predicted remaining run: short ones pass long ones, but only as far as they are shorter. It
   shortens the mean without the long tail of shortest-first.

Order is by requests, not forwards: serving forwards by age shares the device evenly among requests, so that all of them
finish late. With two keys that alternate it is also what lets a group grow: it waits as a whole, and runs as a whole.

Company joins as long as the batch saves time over running its forwards singly. Where batching saves nothing, they run
one request after the other, which ends the first sooner and the last no later.

`bench/stepbatch_policy.py` measures this against other orders, the kind with most rows or with the best gain first
among them: neither pays, since a kind that has to wait grows meanwhile anyway.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeAlias

PATIENCE_S = 60.0
"""Age past which a request goes before every younger one."""
FAIR_WITHIN_S = 1.0
"""Compute seconds that a tenant may be ahead of another before it has to let that one pass."""
_RISK_SHARE = 1.0
"""A deadline is at risk once its slack is less than this share of the remaining run…"""
_RISK_BATCHES = 2.0
"""…plus so many of the longest forwards that wait: what may run before it without anyone asking."""
_LEAST_GAIN = 0.1
"""Share of the seconds of its forwards run singly that a batch must save; less is within the error of the curve."""
_FREE_SHARE = 0.25
"""Most that one of a lower class may lengthen a batch, as a share of its own cost."""

_NO_SECONDS: Mapping[str, float] = MappingProxyType({})
_NO_LIMITS: Mapping[Hashable, int] = MappingProxyType({})

Cost: TypeAlias = Callable[[Hashable, int], float | None]
"""Predicted seconds of a forward by key and rows; None when nothing is known of the key."""
_Rank: TypeAlias = tuple[float, int, bool, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitingForward:
    """A forward that waits for its batch, and what counts of its request. Times are on one clock, in seconds."""

    key: Hashable
    """Equal for forwards that may share a batch."""
    rows: int
    alone: bool = False
    """Never shares a batch."""
    request_id: str = ""
    tenant: str = ""
    priority: int = 0
    """The larger goes first."""
    deadline_s: float = math.inf
    waiting_since_s: float = 0.0
    arrived_s: float | None = None
    """When the request came; None: not known, the forward's own age counts."""
    steps_left: int = 1
    """Forwards of this request still to come, this one included."""


@dataclass(frozen=True, slots=True)
class StepBatch:
    """Positions, among those waiting, of the forwards to run together, the lead first, and why these."""

    positions: tuple[int, ...]
    reason: str


def choose_batch(
    waiting: Sequence[WaitingForward],
    *,
    now_s: float,
    max_rows: int,
    cost: Cost,
    served_s: Mapping[str, float] = _NO_SECONDS,
    row_limits: Mapping[Hashable, int] = _NO_LIMITS,
) -> StepBatch:
    """The forward that comes first, and those of its key that make the batch worth more than they lengthen it.

    `max_rows` and, by key, `row_limits` bound the rows of a batch; a forward of more rows runs alone. `served_s`:
    compute seconds that each tenant had lately, none if it is not there. Where `cost` is None batching is taken to be
    free. Equals go in order of position. O(n log n).
    """
    if not waiting:
        return StepBatch((), "nothing waits")
    view = _View(waiting, now_s, cost, served_s)
    ranks = view.ranks()
    order = sorted(range(len(waiting)), key=ranks.__getitem__)
    lead = waiting[order[0]]
    why = view.why(order[0], ranks[order[0]])
    if lead.alone:
        return StepBatch((order[0],), f"{why}, alone by request")
    candidates = [position for position in order if waiting[position].key == lead.key and not waiting[position].alone]
    row_limit = min(max_rows, row_limits.get(lead.key, max_rows))
    company = _Company(view, candidates, row_limit)
    company.fill()
    return StepBatch(tuple(company.chosen), f"{why}, {company.account()}")


class _View:
    """The waiting forwards with what follows from cost and clock: slack, and the place in the order."""

    __slots__ = ("bound", "cost", "now_s", "own_s", "served_s", "slack_s", "waiting")

    def __init__(
        self, waiting: Sequence[WaitingForward], now_s: float, cost: Cost, served_s: Mapping[str, float]
    ) -> None:
        self.waiting, self.now_s, self.cost, self.served_s = waiting, now_s, cost, served_s
        known: dict[tuple[Hashable, int], float] = {}
        self.own_s: list[float] = []
        """Seconds of each forward by itself, 0 where nothing is known."""
        self.slack_s = [math.inf] * len(waiting)
        """What each request may lose and still meet its deadline; inf without one, or if it is lost already."""
        self.bound: list[int] = []
        """Positions of those that have such a deadline."""
        for position, forward in enumerate(waiting):
            kind = (forward.key, forward.rows)
            own_s = known.get(kind)
            if own_s is None:
                own_s = known[kind] = cost(forward.key, forward.rows) or 0.0
            self.own_s.append(own_s)
            if forward.deadline_s != math.inf:
                slack_s = forward.deadline_s - now_s - own_s * forward.steps_left
                if slack_s >= 0.0:
                    self.slack_s[position] = slack_s
                    self.bound.append(position)

    def ranks(self) -> list[_Rank]:
        """The least goes first: class, risk, tenant, and then what is compared among those equal so far."""
        longest_s = _RISK_BATCHES * max(self.own_s)
        overdue_s = self.now_s - PATIENCE_S
        ahead = self._tenants_ahead()
        ranks: list[_Rank] = []
        for forward, own_s, slack_s in zip(self.waiting, self.own_s, self.slack_s, strict=True):
            arrived_s, run_s = forward.arrived_s, own_s * forward.steps_left
            if arrived_s is None:
                arrived_s = forward.waiting_since_s
            if arrived_s <= overdue_s:
                ranks.append((-math.inf, 0, False, arrived_s))
            elif slack_s <= _RISK_SHARE * run_s + longest_s:
                ranks.append((-forward.priority, 0, False, slack_s))
            else:
                is_ahead = bool(ahead) and (forward.priority, forward.tenant) in ahead
                ranks.append((-forward.priority, 1, is_ahead, arrived_s + run_s))
        return ranks

    def _tenants_ahead(self) -> set[tuple[int, str]]:
        """By class, the tenants that had too much more than the least served one that waits."""
        if not self.served_s or len({forward.tenant for forward in self.waiting}) == 1:
            return set()
        tenants = {(forward.priority, forward.tenant) for forward in self.waiting}
        least_s: dict[int, float] = {}
        for priority, tenant in tenants:
            least_s[priority] = min(self.served_s.get(tenant, 0.0), least_s.get(priority, math.inf))
        return {
            (priority, tenant)
            for priority, tenant in tenants
            if self.served_s.get(tenant, 0.0) > least_s[priority] + FAIR_WITHIN_S
        }

    def why(self, position: int, rank: _Rank) -> str:
        """Why this forward leads."""
        if rank[0] == -math.inf:
            return f"oldest, {self.now_s - rank[3]:.1f} s"
        if rank[1] == 0:
            return f"deadline at risk, slack {rank[3]:.3f} s"
        forward = self.waiting[position]
        return f"first in line of priority {forward.priority}" if forward.priority else "first in line"


class _Company:
    """A batch that fills up: the lead, then the others of its key in order.

    Invariant: each deadline that could be met with the lead running by itself still can be, whether its forward is in
    the batch (and ends with it) or waits for its end.
    """

    def __init__(self, view: _View, candidates: list[int], row_limit: int) -> None:
        self._view, self._candidates, self._row_limit = view, candidates, row_limit
        self._lead = view.waiting[candidates[0]]
        self.chosen = candidates[:1]
        self._refused: dict[str, int] = {}
        """How many did not join, by reason."""
        self._rows = self._lead.rows
        self._seconds = self._lead_s = self._singly_s = view.own_s[candidates[0]]
        self._end_by_s = view.slack_s[candidates[0]] + self._lead_s
        """The longest the batch may take for those in it and those that stay out for certain."""
        if view.bound:
            joining = set(candidates)
            staying = [self._longest_without(position) for position in view.bound if position not in joining]
            self._end_by_s = min([self._end_by_s, *staying])
        self._undecided_s = self._longest_for_undecided()

    def _longest_without(self, position: int) -> float:
        """The longest the batch may take for one that stays out; inf if its deadline is lost with the lead alone."""
        slack_s = self._view.slack_s[position]
        return slack_s if slack_s >= self._lead_s else math.inf

    def _longest_for_undecided(self) -> list[float]:
        """At each place among the candidates: the longest the batch may take for those after it, should none join."""
        longest_s = [math.inf] * len(self._candidates)
        if self._view.bound:
            for place in range(len(self._candidates) - 1, 0, -1):
                longest_s[place - 1] = min(longest_s[place], self._longest_without(self._candidates[place]))
        return longest_s

    def fill(self) -> None:
        """Takes in each candidate that fits, pays, and makes nobody late."""
        for place in range(1, len(self._candidates)):
            if self._rows >= self._row_limit:
                break
            position = self._candidates[place]
            refusal = self._refusal(place, position)
            if refusal is None:
                self.chosen.append(position)
            else:
                self._refused[refusal] = self._refused.get(refusal, 0) + 1
                self._end_by_s = min(self._end_by_s, self._longest_without(position))

    def account(self) -> str:
        """How many joined, and why others did not."""
        full = ", full" if self._rows >= self._row_limit else ""
        refused = "".join(f", {count} {reason}" for reason, count in self._refused.items())
        return f"with {len(self.chosen) - 1} of {len(self._candidates) - 1}{full}{refused}"

    def _refusal(self, place: int, position: int) -> str | None:
        view, forward = self._view, self._view.waiting[position]
        rows = self._rows + forward.rows
        if rows > self._row_limit:
            return "too large"
        own_s = view.own_s[position]
        seconds = view.cost(forward.key, rows) or 0.0
        added_s = seconds - self._seconds
        singly_s = self._singly_s + own_s
        if added_s > (1 - _LEAST_GAIN) * own_s or seconds > (1 - _LEAST_GAIN) * singly_s:
            return "without gain"
        if forward.priority < self._lead.priority and added_s > _FREE_SHARE * own_s:
            return "of a lower class"
        end_by_s = min(self._end_by_s, view.slack_s[position] + own_s)
        if seconds > min(end_by_s, self._undecided_s[place]):
            return "would make a deadline late"
        self._rows, self._seconds, self._singly_s, self._end_by_s = rows, seconds, singly_s, end_by_s
        return None
