"""Which waiting forwards run together."""

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from darkroom.policy.stepbatch import WaitingForward, choose_batch
from tests.policy.trace import TraceEvent, check_trace, traces

FORWARDS = st.builds(WaitingForward, key=st.sampled_from("abc"), rows=st.integers(1, 12), alone=st.booleans())
QUEUES = st.lists(FORWARDS, min_size=1, max_size=12)
MAX_ROWS = st.integers(1, 16)


def waiting(key: str, rows: int = 2, *, alone: bool = False) -> WaitingForward:
    return WaitingForward(key=key, rows=rows, alone=alone)


def positions(*queue: WaitingForward, max_rows: int = 8) -> tuple[int, ...]:
    return choose_batch(queue, max_rows=max_rows).positions


def test_nothing_waiting_is_no_batch() -> None:
    assert positions() == ()


def test_forwards_of_equal_key_share_a_batch_in_order_of_arrival() -> None:
    assert positions(waiting("a"), waiting("b"), waiting("a"), waiting("a")) == (0, 2, 3)


def test_rows_add_up_to_the_limit_and_no_further() -> None:
    assert positions(waiting("a", 4), waiting("a", 4), waiting("a", 1)) == (0, 1)


def test_a_forward_that_does_not_fit_lets_a_smaller_one_pass() -> None:
    assert positions(waiting("a", 4), waiting("a", 6), waiting("a", 4)) == (0, 2)


def test_an_oldest_that_is_alone_runs_alone() -> None:
    assert positions(waiting("a", alone=True), waiting("a")) == (0,)


def test_one_that_is_alone_does_not_join_a_batch() -> None:
    assert positions(waiting("a"), waiting("a", alone=True), waiting("a")) == (0, 2)


def test_more_rows_than_the_limit_run_by_themselves() -> None:
    assert positions(waiting("a", 9), waiting("a", 1)) == (0,)


@pytest.mark.parametrize("name", traces("stepbatch"))
def test_the_golden_trace_is_followed(name: str) -> None:
    check_trace(name, _replay)


@given(QUEUES, MAX_ROWS)
def test_the_oldest_is_always_taken(queue: list[WaitingForward], max_rows: int) -> None:
    assert positions(*queue, max_rows=max_rows)[0] == 0


@given(QUEUES, MAX_ROWS)
def test_keys_are_never_mixed(queue: list[WaitingForward], max_rows: int) -> None:
    assert len({queue[position].key for position in positions(*queue, max_rows=max_rows)}) == 1


@given(QUEUES, MAX_ROWS)
def test_alone_never_shares(queue: list[WaitingForward], max_rows: int) -> None:
    chosen = positions(*queue, max_rows=max_rows)
    assert len(chosen) == 1 or not any(queue[position].alone for position in chosen)


@given(QUEUES, MAX_ROWS)
def test_company_never_passes_the_row_limit(queue: list[WaitingForward], max_rows: int) -> None:
    chosen = positions(*queue, max_rows=max_rows)
    assert len(chosen) == 1 or sum(queue[position].rows for position in chosen) <= max_rows


@given(QUEUES, MAX_ROWS)
def test_nobody_who_would_fit_is_left_out(queue: list[WaitingForward], max_rows: int) -> None:
    chosen = positions(*queue, max_rows=max_rows)
    room = max_rows - sum(queue[position].rows for position in chosen)
    left = [forward for position, forward in enumerate(queue) if position not in chosen]
    if not queue[0].alone:
        assert not [f for f in left if f.key == queue[0].key and not f.alone and f.rows <= room]


@given(QUEUES, MAX_ROWS, st.data())
def test_a_forward_waits_for_at_most_as_many_batches_as_there_were_older_ones(
    queue: list[WaitingForward], max_rows: int, data: st.DataObject
) -> None:
    """Whatever arrives meanwhile."""
    line = list(enumerate(queue))
    served: dict[int, int] = {}
    for batch_count in range(len(queue)):
        chosen = positions(*(forward for _, forward in line), max_rows=max_rows)
        served.update({line[position][0]: batch_count for position in chosen})
        line = [entry for position, entry in enumerate(line) if position not in chosen]
        line.append((len(queue) + batch_count, data.draw(FORWARDS)))
    assert all(served[number] <= number for number in range(len(queue)))


def _replay(events: Iterator[TraceEvent]) -> Iterator[str]:
    line: list[tuple[str, WaitingForward]] = []
    for event in events:
        if event.verb == "arrive":
            named = event.named
            line.append((event.words[0], waiting(named["key"], int(named["rows"]), alone="alone" in named)))
            continue
        batch = choose_batch([forward for _, forward in line], max_rows=int(event.named["max_rows"]))
        yield f"{' '.join(line[position][0] for position in batch.positions) or '-'}: {batch.reason}"
        line = [entry for position, entry in enumerate(line) if position not in batch.positions]
