"""Which waiting forwards run together."""

import math
from collections.abc import Callable, Hashable, Iterator
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from darkroom.policy.stepbatch import FAIR_WITHIN_S, PATIENCE_S, StepBatch, WaitingForward, choose_batch
from tests.policy.trace import TraceEvent, check_trace, traces

NOW_S = 100.0
FIXED_S, ROW_S = 0.006, 0.0015

FORWARDS = st.builds(
    WaitingForward,
    key=st.sampled_from("abc"),
    rows=st.integers(1, 12),
    alone=st.booleans(),
    tenant=st.sampled_from(["", "t1", "t2"]),
    priority=st.integers(0, 1),
    deadline_s=st.one_of(st.just(math.inf), st.floats(NOW_S, NOW_S + 0.2)),
    arrived_s=st.floats(NOW_S - 2 * PATIENCE_S, NOW_S),
    steps_left=st.integers(1, 5),
)
QUEUES = st.lists(FORWARDS, min_size=1, max_size=12)
MAX_ROWS = st.integers(1, 32)
SERVED = st.fixed_dictionaries({"t1": st.floats(0, 5), "t2": st.floats(0, 5)})
CURVES = st.tuples(st.floats(0.0, 0.01), st.floats(0.0001, 0.01))


def affine(fixed_s: float, row_s: float) -> Callable[[Hashable, int], float]:
    return lambda _, rows: fixed_s + row_s * rows


cost = affine(FIXED_S, ROW_S)


def unknown(_key: Hashable, _rows: int) -> None:
    return None


def waiting(
    key: str = "a",
    rows: int = 2,
    *,
    alone: bool = False,
    arrived_s: float = NOW_S,
    slack_s: float = math.inf,
    priority: int = 0,
    tenant: str = "",
    steps: int = 1,
) -> WaitingForward:
    """`slack_s` by the cost curve of this module."""
    run_s = steps * cost(key, rows)
    return WaitingForward(
        key=key,
        rows=rows,
        alone=alone,
        arrived_s=arrived_s,
        deadline_s=NOW_S + run_s + slack_s,
        priority=priority,
        tenant=tenant,
        steps_left=steps,
    )


def positions(*queue: WaitingForward, max_rows: int = 8) -> tuple[int, ...]:
    return choose_batch(queue, now_s=NOW_S, max_rows=max_rows, cost=cost).positions


def test_nothing_waiting_is_no_batch() -> None:
    assert positions() == ()


def test_forwards_of_equal_key_share_a_batch() -> None:
    assert positions(waiting("a"), waiting("b"), waiting("a"), waiting("a")) == (0, 2, 3)


def test_rows_add_up_to_the_limit_and_no_further() -> None:
    assert positions(waiting("a", 4), waiting("a", 4), waiting("a", 5)) == (0, 1)


def test_nobody_joins_who_would_pass_the_limit() -> None:
    assert positions(waiting("a", 4, arrived_s=99), waiting("a", 5)) == (0,)


def test_a_key_may_have_a_limit_of_its_own() -> None:
    queue = [waiting("a") for _ in range(4)]
    chosen = choose_batch(queue, now_s=NOW_S, max_rows=8, cost=cost, row_limits={"a": 4, "b": 2})
    assert len(chosen.positions) == 2


def test_one_that_does_not_fit_lets_a_smaller_one_pass() -> None:
    queue = waiting("a", 4, arrived_s=97), waiting("a", 6, arrived_s=98), waiting("a", 4, arrived_s=99)
    assert positions(*queue) == (0, 2)


def test_a_lead_that_is_alone_runs_alone() -> None:
    assert positions(waiting("a", alone=True, arrived_s=99), waiting("a")) == (0,)


def test_one_that_is_alone_does_not_join_a_batch() -> None:
    assert positions(waiting("a"), waiting("a", alone=True), waiting("a")) == (0, 2)


def test_more_rows_than_the_limit_run_by_themselves() -> None:
    assert positions(waiting("a", 9, arrived_s=99), waiting("a", 1)) == (0,)


def test_the_oldest_request_leads_whatever_waited_longest_for_this_step() -> None:
    old = replace(waiting("a", arrived_s=90), waiting_since_s=NOW_S)
    young = replace(waiting("b", arrived_s=95), waiting_since_s=96)
    assert positions(young, old) == (1,)


def test_without_an_arrival_the_age_of_the_forward_counts() -> None:
    late, early = (WaitingForward(key=key, rows=2, waiting_since_s=since_s) for key, since_s in (("a", 99), ("b", 98)))
    assert positions(late, early) == (1,)


def test_a_short_request_passes_a_long_one_that_came_a_little_before() -> None:
    long, short = waiting("a", arrived_s=99.9, steps=50), waiting("b", steps=2)
    assert positions(long, short) == (1,)
    assert positions(replace(long, arrived_s=99.0), short) == (0,)


def test_the_least_slack_leads_among_deadlines_at_risk() -> None:
    queue = waiting("a", arrived_s=95), waiting("b", slack_s=0.015), waiting("c", slack_s=0.010)
    assert positions(*queue) == (2,)


def test_a_deadline_far_off_does_not_push_in() -> None:
    assert positions(waiting("a", arrived_s=95), waiting("b", slack_s=10)) == (0,)


def test_a_deadline_that_is_lost_does_not_push_in() -> None:
    assert positions(waiting("a", arrived_s=99.9), waiting("b", slack_s=-0.001)) == (0,)


def test_a_higher_class_leads_before_any_slack() -> None:
    assert positions(waiting("a", slack_s=0.01), waiting("b", priority=1)) == (1,)


def test_a_lower_class_joins_only_where_it_hardly_lengthens_the_batch() -> None:
    queue = waiting(priority=1), waiting()
    assert positions(*queue) == (0,)
    flat = choose_batch(queue, now_s=NOW_S, max_rows=8, cost=affine(0.02, 0.0))
    assert flat.positions == (0, 1)


def test_past_the_patience_age_goes_before_class_and_deadline() -> None:
    old = waiting("a", arrived_s=NOW_S - PATIENCE_S)
    assert positions(waiting("b", priority=1, slack_s=0.01), old) == (1,)


def test_a_tenant_that_had_more_lets_others_pass() -> None:
    queue = waiting("a", arrived_s=90, tenant="big"), waiting("b", tenant="small")
    served_s = {"big": FAIR_WITHIN_S + 0.1}
    assert choose_batch(queue, now_s=NOW_S, max_rows=8, cost=cost, served_s=served_s).positions == (1,)
    served_s["small"] = 0.2
    assert choose_batch(queue, now_s=NOW_S, max_rows=8, cost=cost, served_s=served_s).positions == (0,)


def test_company_that_would_make_a_member_late_stays_out() -> None:
    lead = waiting(slack_s=0.002)  # 2 rows more take 3 ms
    assert positions(lead, waiting()) == (0,)
    assert positions(replace(lead, deadline_s=lead.deadline_s + 0.002), waiting()) == (0, 1)


def test_company_that_would_make_another_key_late_stays_out() -> None:
    lead, other = waiting("a", slack_s=0.008), waiting("b", slack_s=0.010)
    assert positions(lead, waiting("a"), other) == (0,)
    assert positions(lead, waiting("a"), replace(other, deadline_s=other.deadline_s + 0.003)) == (0, 1)


def test_company_that_would_make_one_of_its_key_late_that_comes_later_stays_out() -> None:
    first, second = waiting("a", 4, priority=1, arrived_s=98), waiting("a", 4, priority=1, arrived_s=99)
    assert positions(first, second) == (0, 1)
    assert positions(first, second, waiting("a", 4, slack_s=0.015)) == (0,)


def test_company_that_would_make_one_of_its_key_late_that_did_not_fit_stays_out() -> None:
    lead, large = waiting("a", 4, slack_s=0.005), waiting("a", 6, slack_s=0.013)
    assert positions(lead, waiting("a", 2)) == (0, 1)
    assert positions(lead, large, waiting("a", 2)) == (0,)


def test_a_deadline_that_is_lost_either_way_keeps_nobody_out() -> None:
    lead, lost = waiting("a", slack_s=0.006), waiting("b", slack_s=0.007)
    assert positions(lead, waiting("a"), lost) == (0, 1)


def test_a_tight_deadline_of_the_same_key_is_kept_by_joining() -> None:
    assert positions(waiting("a", slack_s=0.004), waiting("a", slack_s=0.005)) == (0, 1)


def test_where_batching_saves_nothing_nobody_joins() -> None:
    queue = [waiting() for _ in range(3)]
    assert choose_batch(queue, now_s=NOW_S, max_rows=8, cost=affine(0.0, 0.003)).positions == (0,)


def test_batching_is_free_while_the_cost_is_unknown() -> None:
    queue = [waiting() for _ in range(3)]
    assert choose_batch(queue, now_s=NOW_S, max_rows=8, cost=unknown).positions == (0, 1, 2)


@pytest.mark.parametrize("name", traces("stepbatch"))
def test_the_golden_trace_is_followed(name: str) -> None:
    check_trace(name, _replay)


@settings(max_examples=25, deadline=None)
@given(QUEUES, MAX_ROWS, SERVED, CURVES, st.dictionaries(st.sampled_from("abc"), st.integers(1, 16)))
def test_a_batch_is_of_one_key_within_its_limits_and_alone_if_asked(
    queue: list[WaitingForward],
    max_rows: int,
    served_s: dict[str, float],
    curve: tuple[float, float],
    row_limits: dict[Hashable, int],
) -> None:
    batch = choose_batch(
        queue, now_s=NOW_S, max_rows=max_rows, cost=affine(*curve), served_s=served_s, row_limits=row_limits
    )
    chosen = [queue[position] for position in batch.positions]
    assert len(set(batch.positions)) == len(chosen) > 0
    assert len({forward.key for forward in chosen}) == 1
    if len(chosen) > 1:
        assert not any(forward.alone for forward in chosen)
        assert sum(forward.rows for forward in chosen) <= min(max_rows, row_limits.get(chosen[0].key, max_rows))


@settings(max_examples=40, deadline=None)
@given(QUEUES, MAX_ROWS, CURVES)
def test_company_makes_nobody_late(queue: list[WaitingForward], max_rows: int, curve: tuple[float, float]) -> None:
    """Neither in the batch nor out of it, compared with the lead running by itself."""
    batch = choose_batch(queue, now_s=NOW_S, max_rows=max_rows, cost=affine(*curve))
    lead_only = StepBatch(batch.positions[:1], "")
    for position in range(len(queue)):
        if _meets_its_deadline(queue, position, lead_only, affine(*curve)):
            assert _meets_its_deadline(queue, position, batch, affine(*curve))


def _meets_its_deadline(
    queue: list[WaitingForward], position: int, batch: StepBatch, cost_s: Callable[[Hashable, int], float]
) -> bool:
    """If it runs by itself once the batch is done."""
    forward = queue[position]
    batch_s = cost_s(forward.key, sum(queue[member].rows for member in batch.positions))
    steps_left = forward.steps_left - (position in batch.positions)
    end_s = NOW_S + batch_s + steps_left * cost_s(forward.key, forward.rows)
    # A nanosecond for the order of additions, in favour of the policy.
    return end_s <= forward.deadline_s + (1e-9 if len(batch.positions) > 1 else -1e-9)


@settings(max_examples=15, deadline=None)
@given(QUEUES, MAX_ROWS, CURVES)
def test_a_batch_takes_less_than_its_forwards_singly(
    queue: list[WaitingForward], max_rows: int, curve: tuple[float, float]
) -> None:
    chosen = choose_batch(queue, now_s=NOW_S, max_rows=max_rows, cost=affine(*curve)).positions
    together_s = affine(*curve)("", sum(queue[position].rows for position in chosen))
    singly_s = sum(affine(*curve)("", queue[position].rows) for position in chosen)
    assert len(chosen) == 1 or together_s < singly_s


@settings(max_examples=15, deadline=None)
@given(QUEUES, SERVED)
def test_nobody_of_a_higher_class_waits_for_a_lead_within_the_patience(
    queue: list[WaitingForward], served_s: dict[str, float]
) -> None:
    lead = queue[choose_batch(queue, now_s=NOW_S, max_rows=8, cost=cost, served_s=served_s).positions[0]]
    if NOW_S - (lead.arrived_s or 0.0) < PATIENCE_S:
        assert lead.priority == max(forward.priority for forward in queue)


@settings(max_examples=15, deadline=None)
@given(st.lists(FORWARDS, min_size=1, max_size=5), st.data())
def test_no_request_waits_longer_than_its_patience_and_the_steps_of_older_ones(
    line: list[WaitingForward], data: st.DataObject
) -> None:
    """Whoever arrives meanwhile: each batch is followed by newcomers of the highest class with deadlines at risk."""
    batch_s = PATIENCE_S / 3
    victim = replace(line[0], arrived_s=NOW_S, priority=0, deadline_s=math.inf, request_id="victim")
    line = [replace(forward, arrived_s=NOW_S - 1 - number) for number, forward in enumerate(line[1:])]
    longest_s = PATIENCE_S + batch_s * (1 + sum(forward.steps_left for forward in line))
    line.append(victim)
    now_s = NOW_S
    while victim in line:
        assert now_s - NOW_S <= longest_s
        batch = choose_batch(line, now_s=now_s, max_rows=16, cost=cost)
        now_s += batch_s
        coming = data.draw(st.lists(FORWARDS, min_size=1, max_size=2))
        urgent = [replace(f, arrived_s=now_s, priority=9, deadline_s=now_s + 0.1) for f in coming]
        line = [*urgent, *_after(line, batch)]


def _after(line: list[WaitingForward], batch: StepBatch) -> list[WaitingForward]:
    """Those left, and those that come back for their next step."""
    left = [forward for position, forward in enumerate(line) if position not in batch.positions]
    ran = [line[position] for position in batch.positions if line[position].steps_left > 1]
    return [*(replace(forward, steps_left=forward.steps_left - 1) for forward in ran), *left]


@settings(max_examples=15, deadline=None)
@given(st.lists(st.floats(0.05, 0.5), min_size=2, max_size=4), st.integers(20, 60))
def test_tenants_that_always_wait_get_equal_seconds(costs_s: list[float], batch_count: int) -> None:
    """But for the seconds that one may be ahead, and the batch that took it there."""
    queue = [
        WaitingForward(key=number, rows=1, tenant=str(number), arrived_s=NOW_S + number, steps_left=10)
        for number in range(len(costs_s))
    ]
    served_s = dict.fromkeys((forward.tenant for forward in queue), 0.0)
    for _ in range(batch_count):
        batch = choose_batch(
            queue, now_s=NOW_S, max_rows=8, cost=lambda key, _: costs_s[int(str(key))], served_s=served_s
        )
        tenant = queue[batch.positions[0]].tenant
        served_s[tenant] += costs_s[int(tenant)]
        assert max(served_s.values()) - min(served_s.values()) <= FAIR_WITHIN_S + max(costs_s) + 1e-9


@settings(max_examples=15, deadline=None)
@given(QUEUES, st.permutations(range(12)), SERVED)
def test_the_order_of_those_that_wait_does_not_choose_the_lead(
    queue: list[WaitingForward], shuffle: list[int], served_s: dict[str, float]
) -> None:
    queue = [replace(forward, arrived_s=NOW_S - number / 7) for number, forward in enumerate(queue)]
    shuffled = [queue[position] for position in shuffle if position < len(queue)]
    leads = [
        line[choose_batch(line, now_s=NOW_S, max_rows=8, cost=unknown, served_s=served_s).positions[0]]
        for line in (queue, shuffled)
    ]
    assert leads[0] == leads[1] or leads[0].deadline_s == leads[1].deadline_s


def _replay(events: Iterator[TraceEvent]) -> Iterator[str]:
    """`cost fixed= row=`; `arrive NAME …` with `at` (arrival), `by` (deadline); `take now= …` with `NAME=` served."""
    line: list[WaitingForward] = []
    curve: Callable[[Hashable, int], float | None] = unknown
    for event in events:
        named = event.named
        if event.verb == "cost":
            curve = affine(float(named["fixed"]), float(named["row"]))
        elif event.verb == "arrive":
            line.append(_arrival(event))
        else:
            now_s, max_rows = float(named.pop("now", "0")), int(named.pop("max_rows"))
            served_s = {tenant: float(seconds) for tenant, seconds in named.items()}
            batch = choose_batch(line, now_s=now_s, max_rows=max_rows, cost=curve, served_s=served_s)
            yield f"{' '.join(line[position].request_id for position in batch.positions) or '-'}: {batch.reason}"
            line = [forward for position, forward in enumerate(line) if position not in batch.positions]


def _arrival(event: TraceEvent) -> WaitingForward:
    named = event.named
    return WaitingForward(
        request_id=event.words[0],
        key=named["key"],
        rows=int(named["rows"]),
        alone="alone" in named,
        tenant=named.get("tenant", ""),
        priority=int(named.get("priority", "0")),
        deadline_s=float(named.get("by", "inf")),
        arrived_s=float(named.get("at", "0")),
        steps_left=int(named.get("steps", "1")),
    )
