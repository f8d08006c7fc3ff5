"""The executor by itself, with a network of one line: what batches, what does not, and how programs end."""

import threading
from concurrent.futures import CancelledError
from functools import partial

import pytest
import torch

from darkroom.models.executor import Executor
from darkroom.models.standins import Batched


class Doubling(torch.nn.Module):
    """Doubles its input, and notes the rows of each call; holds the first call until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []
        self.is_entered, self.may_go = threading.Event(), threading.Event()
        self.may_go.set()

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, scale: float = 2.0) -> tuple[torch.Tensor]:
        self.rows.append(len(sample))
        self.is_entered.set()
        assert self.may_go.wait(10)
        if bool((sample < 0).any()):
            raise ValueError("negative")
        return (sample * scale + 0 * timestep.reshape(-1, *[1] * (sample.ndim - 1)),)


def steps(network: torch.nn.Module, value: float, count: int, *, width: int = 3, scale: float = 2.0) -> torch.Tensor:
    sample = torch.full((2, width), value)
    for step in range(count):
        (sample,) = network(sample, torch.tensor(step), scale=scale)
    return sample


@pytest.fixture
def network() -> Doubling:
    return Doubling()


def test_programs_of_different_lengths_share_batches_and_get_their_own_rows(network: Doubling) -> None:
    executor, stand_in = Executor(max_batch_rows=16), Batched(network, "doubling")
    network.may_go.clear()
    runs = [executor.submit(partial(steps, stand_in, float(i), 3 + i)) for i in range(4)]
    network.may_go.set()
    for i, (future, _) in enumerate(runs):
        assert torch.equal(future.result(10), torch.full((2, 3), i * 2.0 ** (3 + i)))
    assert sum(network.rows) == 2 * (3 + 4 + 5 + 6)
    assert max(network.rows) == 8
    assert executor.counts.forwards == 18
    assert executor.counts.batches == len(network.rows) < 18
    executor.close()


@pytest.mark.parametrize("other", [{"width": 4}, {"scale": 3.0}])
def test_calls_of_another_shape_or_option_do_not_share_a_batch(network: Doubling, other: dict[str, int]) -> None:
    executor, stand_in = Executor(max_batch_rows=16), Batched(network, "doubling")
    runs = [executor.submit(partial(steps, stand_in, 1.0, 4, **options)) for options in ({}, other)]
    for future, counts in runs:
        future.result(10)
        assert counts.batched == 0
    executor.close()


def test_a_batch_has_at_most_as_many_rows_as_it_may(network: Doubling) -> None:
    executor, stand_in = Executor(max_batch_rows=4), Batched(network, "doubling")
    runs = [executor.submit(partial(steps, stand_in, 1.0, 5)) for _ in range(5)]
    for future, _ in runs:
        future.result(10)
    assert max(network.rows) <= 4
    executor.close()


def test_a_program_that_fails_fails_alone(network: Doubling) -> None:
    executor, stand_in = Executor(max_batch_rows=16), Batched(network, "doubling")
    network.may_go.clear()
    bad, _ = executor.submit(partial(steps, stand_in, -1.0, 4))
    good, _ = executor.submit(partial(steps, stand_in, 1.0, 4))
    network.may_go.set()
    assert torch.equal(good.result(10), torch.full((2, 3), 16.0))
    with pytest.raises(ValueError, match="negative"):
        bad.result(10)
    assert executor.submit(lambda: 7)[0].result(10) == 7
    executor.close()


def test_closing_ends_programs_that_wait(network: Doubling) -> None:
    executor, stand_in = Executor(max_batch_rows=16), Batched(network, "doubling")
    network.may_go.clear()
    future, _ = executor.submit(partial(steps, stand_in, 1.0, 1000))
    assert network.is_entered.wait(10)
    closing = threading.Thread(target=executor.close)
    closing.start()
    network.may_go.set()
    closing.join(10)
    assert not closing.is_alive()
    with pytest.raises(CancelledError):
        future.result(0)
    assert len(network.rows) < 1000


def test_a_batched_network_outside_the_executor_says_so(network: Doubling) -> None:
    with pytest.raises(RuntimeError, match="outside the executor"):
        Batched(network, "doubling")(torch.ones(1, 3), torch.tensor(0))


def test_grad_mode_stays_off_in_every_program(network: Doubling) -> None:
    executor, stand_in = Executor(max_batch_rows=16), Batched(network, "doubling")

    def program(count: int) -> bool:
        with torch.no_grad():
            steps(stand_in, 1.0, count)
        return torch.is_inference_mode_enabled() and not torch.is_grad_enabled()

    runs = [executor.submit(partial(program, count)) for count in (2, 5, 3)]
    assert all(future.result(10) for future, _ in runs)
    executor.close()
