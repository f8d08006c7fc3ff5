"""What can happen to a program between two forwards: no memory, no slot, no time left, waits, a stuck call."""

import contextlib
import gc
import threading
import time
from concurrent.futures import CancelledError, Future
from functools import partial

import greenlet
import pytest
import torch

from darkroom.errors import DeadlinePassed, Moved
from darkroom.models.executor import Executor
from darkroom.models.program import ProgramEnded, Ticket, wait_elsewhere
from darkroom.models.standins import Batched
from tests.models.test_executor import Doubling, steps


class SmallMemory(Doubling):
    """Has room for so many rows; more raise what torch raises."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, scale: float = 2.0) -> tuple[torch.Tensor]:
        if len(sample) > self.room:
            self.rows.append(-len(sample))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(sample, timestep, scale)


def test_a_batch_too_large_for_memory_is_halved_and_the_size_remembered() -> None:
    network = SmallMemory(room=4)
    executor, stand_in = Executor(max_batch_rows=16), Batched(network, "small")
    network.may_go.clear()
    runs = [executor.submit(partial(steps, stand_in, float(i), 6)) for i in range(8)]
    network.may_go.set()
    for i, (future, _) in enumerate(runs):
        assert torch.equal(future.result(10), torch.full((2, 3), i * 2.0**6))
    refused = [-rows for rows in network.rows if rows < 0]
    assert len(refused) <= 2, "a size that did not fit is not tried again at once"
    assert max(network.rows) == 4
    executor.close()


def test_only_the_request_that_can_never_fit_fails() -> None:
    network = SmallMemory(room=3)
    executor, stand_in = Executor(max_batch_rows=16), Batched(network, "small")

    def too_large() -> torch.Tensor:
        (answer,) = stand_in(torch.ones(4, 3), torch.tensor(0), scale=2.0)
        return answer  # type: ignore[no-any-return]

    network.may_go.clear()
    good = [executor.submit(partial(steps, stand_in, 1.0, 3))[0] for _ in range(3)]
    bad, _ = executor.submit(too_large)
    network.may_go.set()
    with pytest.raises(torch.OutOfMemoryError):
        bad.result(10)
    assert all(torch.equal(future.result(10), torch.full((2, 3), 8.0)) for future in good)
    executor.close()


def test_a_program_that_waits_elsewhere_does_not_hold_up_the_others() -> None:
    network = Doubling()
    executor, stand_in = Executor(max_batch_rows=16), Batched(network, "doubling")
    away: Future[float] = Future()
    waiting, _ = executor.submit(lambda: steps(stand_in, wait_elsewhere(lambda: away), 2))
    others, _ = executor.submit(partial(steps, stand_in, 1.0, 20))
    assert torch.equal(others.result(10), torch.full((2, 3), 2.0**20))
    assert not waiting.done()
    away.set_result(5.0)
    assert torch.equal(waiting.result(10), torch.full((2, 3), 20.0))
    executor.close()


def test_what_fails_elsewhere_is_raised_where_it_was_called() -> None:
    executor = Executor(max_batch_rows=16)
    away: Future[float] = Future()

    def program() -> str:
        try:
            wait_elsewhere(lambda: away)
        except ConnectionError:
            return "caught"
        return "not raised"

    run, _ = executor.submit(program)
    away.set_exception(ConnectionError())
    assert run.result(10) == "caught"
    executor.close()


def test_cancelling_a_program_that_waits_elsewhere_ends_it_at_once() -> None:
    executor = Executor(max_batch_rows=16)
    ended = threading.Event()

    def program() -> None:
        try:
            wait_elsewhere(Future)
        finally:
            ended.set()

    run, _ = executor.submit(program)
    executor.submit(lambda: None)[0].result(10)
    run.cancel()
    assert ended.wait(10)
    executor.close()


def test_a_deadline_ends_a_program_within_a_step_even_when_nothing_else_happens() -> None:
    executor = Executor(max_batch_rows=16)
    start_s = time.monotonic()
    run, _ = executor.submit(lambda: wait_elsewhere(Future), ticket=Ticket(deadline_s=start_s + 0.2))
    with pytest.raises(DeadlinePassed):
        run.result(10)
    assert 0.2 <= time.monotonic() - start_s < 2
    executor.close()


class Counting:
    """A restartable program: counts to its end, and keeps its count when it is pushed out."""

    def __init__(self, network: torch.nn.Module, end: int) -> None:
        self.network, self.end, self.count, self.starts = network, end, 0, 0

    def __call__(self) -> int:
        self.starts += 1
        while self.count < self.end:
            self.network(torch.ones(1, 3), torch.tensor(0), scale=2.0)
            self.count += 1
        return self.count


def test_an_urgent_request_pushes_out_one_with_time_to_spare_which_goes_on_later() -> None:
    network = Doubling()
    executor, stand_in = Executor(max_batch_rows=16, slot_count=1), Batched(network, "doubling")
    patient = Counting(stand_in, 3000)
    now_s = time.monotonic()
    long, long_ticket = executor.submit(
        patient, ticket=Ticket(request_id="patient", restartable=True, forwards_left=3000)
    )
    assert network.is_entered.wait(10)
    while patient.count < 100:
        time.sleep(0.001)
    long_ticket.forwards_left = 500_000  # far more than fits before the urgent one's deadline
    urgent, _ = executor.submit(
        Counting(stand_in, 5), ticket=Ticket(request_id="urgent", deadline_s=now_s + 5, forwards_left=5)
    )
    assert urgent.result(10) == 5
    assert not long.done(), "the urgent one did not wait for the long one's end"
    assert long.result(30) == 3000
    assert (patient.starts, long_ticket.pushed_out) == (2, 1)
    assert len(network.rows) == 3005, "nothing is done twice"
    executor.close()


def test_handing_back_ends_what_can_go_on_elsewhere_and_keeps_the_rest() -> None:
    network = Doubling()
    executor, stand_in = Executor(max_batch_rows=16), Batched(network, "doubling")
    kept: list[str] = []

    def movable() -> None:
        try:
            steps(stand_in, 1.0, 100_000)
        except ProgramEnded:
            kept.append("state")
            raise

    moved, _ = executor.submit(movable, ticket=Ticket(movable=True))
    stays, _ = executor.submit(partial(steps, stand_in, 1.0, 50))
    assert network.is_entered.wait(10)
    executor.hand_back(Moved("denoiser-1"))
    with pytest.raises(Moved):
        moved.result(10)
    assert kept == ["state"]
    late, _ = executor.submit(movable, ticket=Ticket(movable=True))
    with pytest.raises(Moved):
        late.result(10)
    assert stays.result(10).shape == (2, 3)
    executor.close()


def test_clean_up_code_that_calls_a_network_cannot_keep_a_program_alive() -> None:
    network = Doubling()
    executor, stand_in = Executor(max_batch_rows=16), Batched(network, "doubling")

    def stubborn() -> None:
        for _ in range(3):
            with contextlib.suppress(BaseException):
                steps(stand_in, 1.0, 1_000_000)

    run, _ = executor.submit(stubborn)
    assert network.is_entered.wait(10)
    run.cancel()
    after, _ = executor.submit(partial(steps, stand_in, 1.0, 2))
    after.result(10)
    assert executor.resident_count == 0
    executor.close()


def test_a_forward_that_does_not_come_back_is_noticed() -> None:
    network = Doubling()
    executor, stand_in = Executor(max_batch_rows=16), Batched(network, "doubling")
    executor.submit(partial(steps, stand_in, 1.0, 20))[0].result(10)
    assert executor.overdue_s(time.monotonic()) < 0
    network.is_entered.clear()
    network.may_go.clear()
    run, _ = executor.submit(partial(steps, stand_in, 1.0, 1))
    assert network.is_entered.wait(10)
    assert executor.overdue_s(time.monotonic()) < 0
    assert executor.overdue_s(time.monotonic() + 2.9) < 0
    assert executor.overdue_s(time.monotonic() + 3.1) > 0
    network.may_go.set()
    run.result(10)
    assert executor.overdue_s(time.monotonic() + 100) < 0
    executor.close()


def test_a_first_forward_may_take_long() -> None:
    network = Doubling()
    executor, stand_in = Executor(max_batch_rows=16), Batched(network, "doubling")
    network.may_go.clear()
    run, _ = executor.submit(partial(steps, stand_in, 1.0, 1))
    assert network.is_entered.wait(10)
    assert executor.overdue_s(time.monotonic() + 100) < 0
    network.may_go.set()
    run.result(10)
    executor.close()


def test_many_cancelled_programs_leave_nothing_behind() -> None:
    network = Doubling()
    executor, stand_in = Executor(max_batch_rows=16, slot_count=8), Batched(network, "doubling")
    for round_number in range(20):
        runs = [executor.submit(partial(steps, stand_in, 1.0, 10_000))[0] for _ in range(50)]
        for number, future in enumerate(runs):
            if number % 7 == round_number % 7:
                time.sleep(0.0005)
            future.cancel()
    executor.submit(lambda: None)[0].result(30)
    assert (executor.resident_count, executor.queued_count) == (0, 0)
    for future in runs:
        with pytest.raises(CancelledError):
            future.result(0)
    executor.close()
    assert not [o for o in _greenlets() if not o.dead and o is not greenlet.getcurrent() and o.parent is not None]


def _greenlets() -> list[greenlet.greenlet]:
    gc.collect()
    return [o for o in gc.get_objects() if type(o) is greenlet.greenlet]


def test_idle_moments_teach_what_larger_batches_cost() -> None:
    network = Doubling()
    executor, stand_in = Executor(max_batch_rows=16, probes=True), Batched(network, "doubling")
    executor.submit(partial(steps, stand_in, 1.0, 3))[0].result(10)
    deadline_s = time.monotonic() + 10
    while network.rows.count(16) < 2 and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert network.rows == [2] * 3 + [2, 2, 4, 4, 8, 8, 16, 16]
    assert executor.counts.batches == 3, "nobody asked for the others"
    key = next(iter(executor.costs._kinds))
    assert sorted(executor.costs.measured(key)) == [2, 4, 8, 16]
    before = len(network.rows)
    executor.submit(partial(steps, stand_in, 1.0, 2))[0].result(10)
    executor.submit(lambda: None)[0].result(10)
    assert len(network.rows) == before + 2, "what is known is not measured again"
    again = Doubling()
    executor.submit(partial(steps, Batched(again, "again"), 1.0, 2))[0].result(10)
    executor.submit(lambda: None)[0].result(10)
    assert again.rows == [2, 2], "nor of a network that is built alike, as of a model that was loaded again"
    executor.close()


def test_a_first_forward_is_given_time_whatever_others_of_its_build_take() -> None:
    executor = Executor(max_batch_rows=16)
    patience_s: list[float] = []

    class Patient(Doubling):
        def forward(self, sample: torch.Tensor, timestep: torch.Tensor, scale: float = 2.0) -> tuple[torch.Tensor]:
            patience_s.append(-executor.overdue_s(time.monotonic()))
            return super().forward(sample, timestep, scale)

    for stand_in in (Batched(Patient(), "one"), Batched(Patient(), "two")):
        executor.submit(partial(steps, stand_in, 1.0, 2))[0].result(10)
    assert patience_s[0::2] == pytest.approx([300.0, 300.0], abs=5.0)
    assert patience_s[1::2] == pytest.approx([3.0, 3.0], abs=1.0)
    executor.close()


def test_a_probe_that_does_not_fit_ends_the_probing_of_its_kind() -> None:
    network = SmallMemory(room=4)
    executor, stand_in = Executor(max_batch_rows=16, probes=True), Batched(network, "small")
    executor.submit(partial(steps, stand_in, 1.0, 3))[0].result(10)
    deadline_s = time.monotonic() + 10
    while -8 not in network.rows and time.monotonic() < deadline_s:
        time.sleep(0.01)
    executor.submit(lambda: None)[0].result(10)
    assert network.rows[3:] == [2, 2, 4, 4, -8]
    executor.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_that_died_of_a_bug_is_overdue() -> None:
    executor = Executor(max_batch_rows=16)
    assert executor.overdue_s(time.monotonic()) < 0
    executor.submit(lambda: None, ticket=Ticket(deadline_s="soon"))  # type: ignore[arg-type]
    executor._thread.join(10)
    assert executor.overdue_s(time.monotonic()) > 0
