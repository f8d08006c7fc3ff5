"""Which requests hold a slot."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from darkroom.policy.slots import (
    MARGIN_S,
    MAX_PUSH_OUTS,
    PATIENCE_S,
    SlotChoice,
    SlotRequest,
    choose_slots,
)
from tests.policy.trace import TraceEvent, check_trace, traces

NOW_S = 100.0
REQUESTS = st.builds(
    SlotRequest,
    request_id=st.text("abc", min_size=1, max_size=3),
    remaining_s=st.floats(0.0, 10.0),
    deadline_s=st.one_of(st.just(math.inf), st.floats(NOW_S, NOW_S + 30)),
    priority=st.integers(0, 1),
    tenant=st.sampled_from(["t1", "t2"]),
    waiting_since_s=st.floats(NOW_S - 2 * PATIENCE_S, NOW_S),
    is_restartable=st.booleans(),
    pushed_out_count=st.integers(0, MAX_PUSH_OUTS),
)
LINES = st.lists(REQUESTS, max_size=6)


def request(
    name: str,
    remaining_s: float = 10.0,
    *,
    slack_s: float = math.inf,
    since_s: float = NOW_S,
    priority: int = 0,
    tenant: str = "",
    restartable: bool = True,
    pushed_out: int = 0,
) -> SlotRequest:
    return SlotRequest(
        request_id=name,
        remaining_s=remaining_s,
        deadline_s=NOW_S + remaining_s + slack_s,
        priority=priority,
        tenant=tenant,
        waiting_since_s=since_s,
        is_restartable=restartable,
        pushed_out_count=pushed_out,
    )


def chosen(waiting: list[SlotRequest], resident: list[SlotRequest], slots: int) -> tuple[str, str]:
    """Names of those that start, and of those pushed out."""
    choice = choose_slots(waiting, resident, slot_count=slots, now_s=NOW_S)
    names = [waiting[position].request_id for position in choice.start]
    return " ".join(names), " ".join(resident[position].request_id for position in choice.push_out)


URGENT = request("urgent", 2.0, slack_s=1.0)


def test_the_oldest_fill_the_free_slots() -> None:
    line = [request("b", since_s=91), request("a", since_s=90), request("c", since_s=92)]
    assert chosen(line, [request("r")], 3) == ("a b", "")


def test_full_slots_wait() -> None:
    assert chosen([request("a")], [request("r")], 1) == ("", "")


def test_more_residents_than_slots_start_nobody() -> None:
    assert chosen([request("a")], [request("r"), request("s")], 1) == ("", "")


def test_a_class_goes_before_a_deadline_and_a_deadline_before_age() -> None:
    line = [request("old", since_s=90), request("urgent", slack_s=2), request("first", priority=1)]
    assert chosen(line, [], 2) == ("first urgent", "")


def test_a_lost_deadline_goes_by_age() -> None:
    assert chosen([request("lost", slack_s=-1), request("old", since_s=90)], [], 1) == ("old", "")


def test_a_deadline_far_off_goes_by_age() -> None:
    assert chosen([request("calm", slack_s=500), request("old", since_s=90)], [], 1) == ("old", "")


def test_past_the_patience_only_age_counts() -> None:
    line = [request("first", priority=9), request("old", since_s=NOW_S - PATIENCE_S)]
    assert chosen(line, [], 1) == ("old", "")


def test_tenants_take_turns() -> None:
    line = [request(f"big{n}", tenant="big", since_s=90 + n) for n in range(3)]
    line.append(request("small", tenant="small", since_s=99))
    assert chosen(line, [], 2) == ("big0 small", "")
    assert chosen(line, [request("r", tenant="big")], 2) == ("small", "")


def test_a_deadline_that_waiting_would_lose_takes_a_slot() -> None:
    assert chosen([URGENT], [request("r")], 1) == ("urgent", "r")


def test_a_deadline_that_can_wait_waits() -> None:
    assert chosen([request("calm", 2, slack_s=5)], [request("r", 10), request("s", 4)], 2) == ("", "")


def test_a_deadline_that_is_lost_anyway_pushes_nobody_out() -> None:
    assert chosen([request("lost", 2, slack_s=-1)], [request("r")], 1) == ("", "")


def test_one_without_deadline_pushes_nobody_out() -> None:
    assert chosen([request("a", 1)], [request("r", 100)], 1) == ("", "")


@pytest.mark.parametrize(
    "resident",
    [
        request("cannot resume", restartable=False),
        request("higher class", priority=1),
        request("often enough", pushed_out=MAX_PUSH_OUTS),
        request("late if it waited", slack_s=2.0),
        request("hardly more slack", 2.0, slack_s=1.0 + MARGIN_S / 2),
    ],
    ids=lambda resident: resident.request_id,
)
def test_it_stays(resident: SlotRequest) -> None:
    assert chosen([URGENT], [resident], 1) == ("", "")


def test_one_with_slack_enough_to_wait_is_pushed_out() -> None:
    assert chosen([URGENT], [request("calm", slack_s=3)], 1) == ("urgent", "calm")


def test_the_lowest_class_goes_first_and_then_the_most_slack_and_the_most_to_do() -> None:
    calm = request("calm", slack_s=50)
    longer, shorter = request("longer", 20), request("shorter", 10)
    urgent = replace(URGENT, priority=1)
    assert chosen([urgent], [calm, shorter, longer], 3) == ("urgent", "longer")
    assert chosen([urgent], [replace(longer, priority=1), shorter, calm], 3) == ("urgent", "shorter")


def test_two_arrivals_push_out_two() -> None:
    other = request("other", 3, slack_s=0.5)
    assert chosen([URGENT, other], [request("r", 20), request("s", 10)], 2) == ("other urgent", "r s")


@pytest.mark.parametrize("name", traces("slots"))
def test_the_golden_trace_is_followed(name: str) -> None:
    check_trace(name, _replay)


@settings(max_examples=20, deadline=None)
@given(LINES, LINES, st.integers(0, 6))
def test_slots_are_filled_and_never_overfilled(
    waiting: list[SlotRequest], resident: list[SlotRequest], slot_count: int
) -> None:
    choice = choose_slots(waiting, resident, slot_count=slot_count, now_s=NOW_S)
    free_count = max(0, slot_count - len(resident))
    assert len(set(choice.start)) == len(choice.start)
    assert len(set(choice.push_out)) == len(choice.push_out)
    assert len(choice.start) - len(choice.push_out) == min(free_count, len(waiting))
    assert not choice.push_out or len(waiting) > free_count


@settings(max_examples=30, deadline=None)
@given(LINES, LINES, st.integers(0, 6))
def test_a_push_out_saves_a_deadline_and_costs_none(
    waiting: list[SlotRequest], resident: list[SlotRequest], slot_count: int
) -> None:
    choice = choose_slots(waiting, resident, slot_count=slot_count, now_s=NOW_S)
    savers = choice.start[len(choice.start) - len(choice.push_out) :]
    for saver, victim in zip(savers, choice.push_out, strict=True):
        arrival, pushed = waiting[saver], resident[victim]
        assert 0.0 <= arrival.slack_s(NOW_S) < math.inf
        assert pushed.is_restartable
        assert pushed.pushed_out_count < MAX_PUSH_OUTS
        assert pushed.priority <= arrival.priority
        slack_s = pushed.slack_s(NOW_S)
        assert slack_s < 0 or slack_s >= max(arrival.remaining_s, arrival.slack_s(NOW_S)) + MARGIN_S


@dataclass(slots=True)
class _Device:
    """Residents run side by side, each at the pace predicted."""

    slot_count: int
    now_s: float = NOW_S
    resident: list[SlotRequest] = field(default_factory=list)
    waiting: list[SlotRequest] = field(default_factory=list)
    swaps: list[tuple[float, str, str, bool]] = field(default_factory=list)
    """When, who came in, who was pushed out, and whether the latter's deadline was lost already."""

    def pass_time(self, seconds: float) -> None:
        self.now_s += seconds
        shorter = [replace(r, remaining_s=r.remaining_s - seconds) for r in self.resident]
        self.resident = [r for r in shorter if r.remaining_s > 1e-9]

    def choose(self) -> SlotChoice:
        choice = choose_slots(self.waiting, self.resident, slot_count=self.slot_count, now_s=self.now_s)
        starting = [self.waiting[position] for position in choice.start]
        pushed = [self.resident[position] for position in choice.push_out]
        for saver, victim in zip(starting[len(starting) - len(pushed) :], pushed, strict=True):
            is_lost = victim.slack_s(self.now_s) < 0
            self.swaps.append((self.now_s, saver.request_id, victim.request_id, is_lost))
        self.resident = [r for r in self.resident if r not in pushed] + starting
        self.waiting = [r for r in self.waiting if r not in starting]
        self.waiting += [replace(r, pushed_out_count=r.pushed_out_count + 1) for r in pushed]
        return choice


@settings(max_examples=12, deadline=None)
@given(st.data(), st.integers(1, 3))
def test_swaps_are_few_and_are_not_undone_at_once(data: st.DataObject, slot_count: int) -> None:
    device = _Device(slot_count)
    for number in range(15):
        remaining_s, slack_s = data.draw(st.tuples(st.integers(1, 8), st.sampled_from((0.2, 1, 3, 9, 30, math.inf))))
        arrival = request(str(number), remaining_s, slack_s=slack_s + device.now_s - NOW_S, since_s=device.now_s)
        device.waiting.append(arrival)
        device.choose()
        device.choose()
        device.pass_time(data.draw(st.sampled_from((0.1, 0.5, 1.0, 2.0))))
    assert all(count <= MAX_PUSH_OUTS for count in Counter(victim for _, _, victim, _ in device.swaps).values())
    for place, (at_s, saver, victim, _) in enumerate(device.swaps):
        undone = [later_s for later_s, *who in device.swaps[place + 1 :] if who == [victim, saver, False]]
        assert all(later_s - at_s >= 2 * MARGIN_S - 1e-6 for later_s in undone)


@settings(max_examples=12, deadline=None)
@given(st.lists(REQUESTS, min_size=1, max_size=4), st.data())
def test_a_request_gets_a_slot_once_it_is_older_than_the_patience(line: list[SlotRequest], data: st.DataObject) -> None:
    """Whoever arrives meanwhile, as long as slots fall free: one for each that came before it."""
    victim = request("victim", since_s=NOW_S)
    device = _Device(1, waiting=[*(replace(r, waiting_since_s=NOW_S - 1, request_id="older") for r in line), victim])
    seconds = PATIENCE_S / 4
    for _ in range(5 + len(line)):
        device.waiting += [
            replace(r, priority=9, waiting_since_s=device.now_s, request_id="newer", remaining_s=seconds)
            for r in data.draw(st.lists(REQUESTS, min_size=1, max_size=2))
        ]
        device.choose()
        device.pass_time(seconds)
    assert not any(r.request_id == "victim" for r in device.waiting)


def _replay(events: Iterator[TraceEvent]) -> Iterator[str]:
    """`resident NAME left=…` and `wait NAME left=…`, with `by` (deadline), `at` (arrival); `choose slots= now=`."""
    waiting: list[SlotRequest] = []
    resident: list[SlotRequest] = []
    for event in events:
        named = event.named
        if event.verb in ("wait", "resident"):
            (waiting if event.verb == "wait" else resident).append(_request(event))
            continue
        choice = choose_slots(waiting, resident, slot_count=int(named["slots"]), now_s=float(named["now"]))
        names = [waiting[position].request_id for position in choice.start]
        yield f"{' '.join(names) or '-'}: {choice.reason}"
        waiting = [r for position, r in enumerate(waiting) if position not in choice.start]
        resident = [r for position, r in enumerate(resident) if position not in choice.push_out]


def _request(event: TraceEvent) -> SlotRequest:
    named = event.named
    return SlotRequest(
        request_id=event.words[0],
        remaining_s=float(named["left"]),
        deadline_s=float(named.get("by", "inf")),
        priority=int(named.get("priority", "0")),
        tenant=named.get("tenant", ""),
        waiting_since_s=float(named.get("at", "0")),
        is_restartable="fixed" not in named,
        pushed_out_count=int(named.get("pushed", "0")),
    )
