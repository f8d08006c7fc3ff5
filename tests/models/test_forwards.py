"""A forward as a value: which calls share a batch, and that each gets what it would have got alone."""

import contextlib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutput

from darkroom.models.forwards import Adapter, Entry, Forward, Unmixable, carrying, run_batch


class Weighing(torch.nn.Module):
    """Weighs its sample with a table that all rows share, and notes the rows of each call."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        table: torch.Tensor | None = None,
        more: Any = None,
        *,
        as_output: bool = False,
    ) -> Any:
        self.rows.append(len(sample))
        answer = sample * timestep.reshape(-1, 1)
        if table is not None:
            answer = answer * table.sum()
        if more is not None:
            answer = answer + more["added"]
        return BaseModelOutput(last_hidden_state=answer) if as_output else (answer, "note")


@dataclass(frozen=True, slots=True)
class Scaling:
    """An adapter that scales the answer; its network tells rows apart, or cannot."""

    network: Weighing
    factor: float
    can_mix: bool = True
    company: Hashable = None
    is_beside: bool = True
    runs: list[list[int]] = field(default_factory=list, compare=False)

    def run(
        self, entry: Entry, rows: Sequence[tuple[Adapter | None, int]], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        assert entry.method == "forward"
        self.runs.append([count for _, count in rows])
        if len(rows) > 1 and not self.can_mix:
            raise Unmixable
        answer, note = self.network(*args, **kwargs)
        factors = [adapter.factor if isinstance(adapter, Scaling) else 1.0 for adapter, _ in rows]
        counts = torch.tensor([count for _, count in rows])
        return answer * torch.repeat_interleave(torch.tensor(factors), counts).reshape(-1, 1), note


@pytest.fixture
def network() -> Weighing:
    return Weighing()


def entry(network: Weighing) -> Entry:
    return Entry.of(network, "forward", "weighing", ("table",))


def forward(network: Weighing, value: float, adapter: Scaling | None, rows: int = 1) -> Forward:
    """A call that carries the adapter."""
    with carrying(adapter) if adapter else contextlib.nullcontext():
        return Forward(entry(network), (sample(value, rows), torch.tensor(1)), {})


def sample(value: float, rows: int = 1) -> torch.Tensor:
    return torch.full((rows, 3), value)


def test_calls_share_a_batch_whatever_their_rows_and_timesteps(network: Weighing) -> None:
    calls = [
        Forward(entry(network), (sample(1.0, 2), torch.tensor(3)), {}),
        Forward(entry(network), (sample(2.0), torch.tensor([2.0])), {}),
        Forward(entry(network), (), {"timestep": torch.tensor([1, 2, 3]), "sample": sample(4.0, 3)}),
    ]
    assert [call.rows for call in calls] == [2, 1, 3]
    assert calls[0].key == calls[1].key
    (first, note), (second, _) = run_batch(calls[:2])
    assert (first.tolist(), second.tolist(), note) == ([[3.0] * 3] * 2, [[4.0] * 3], "note")
    assert network.rows == [3]
    assert run_batch(calls[2:])[0][0].tolist() == [[4.0] * 3, [8.0] * 3, [12.0] * 3]


@pytest.mark.parametrize(
    "other",
    [
        {"as_output": True},
        {"more": {"added": torch.zeros(1, 3)}},
        {"table": torch.zeros(3)},
        {"sample": torch.zeros(1, 4)},
        {"sample": torch.zeros(1, 3, dtype=torch.float64)},
    ],
)
def test_calls_that_differ_in_shape_type_option_or_structure_do_not(network: Weighing, other: dict[str, Any]) -> None:
    usual = {"sample": sample(1.0), "timestep": torch.tensor(1)}
    assert Forward(entry(network), (), usual).key == Forward(entry(network), (), dict(usual)).key
    assert Forward(entry(network), (), usual).key != Forward(entry(network), (), {**usual, **other}).key


def test_equal_tensors_under_other_names_of_a_dict_are_another_call(network: Weighing) -> None:
    named = [
        Forward(entry(network), (sample(1.0), torch.tensor(1)), {"more": {name: torch.ones(1, 3)}})
        for name in ("added", "added", "removed")
    ]
    assert named[0].key == named[1].key != named[2].key


def test_an_output_class_is_split_into_output_classes(network: Weighing) -> None:
    calls = [Forward(entry(network), (sample(float(i)), torch.tensor(2)), {"as_output": True}) for i in range(3)]
    answers = run_batch(calls)
    assert [answer.last_hidden_state.tolist() for answer in answers] == [[[2.0 * i] * 3] for i in range(3)]
    assert network.rows == [3]


def weighed(network: Weighing, table: torch.Tensor) -> Forward:
    return Forward(entry(network), (sample(1.0), torch.tensor(1)), {"table": table})


@torch.inference_mode()
def test_a_shared_argument_is_shared_by_content(network: Weighing) -> None:
    same, other = [torch.ones(4) for _ in range(2)], torch.zeros(4)
    calls = [weighed(network, table) for table in (*same, other)]
    assert calls[0].key == calls[1].key != calls[2].key
    assert [answer[0, 0].item() for answer, _ in run_batch(calls[:2])] == [4.0, 4.0]
    assert network.rows == [2]


@torch.inference_mode()
def test_a_shared_argument_changed_in_place_changes_only_its_own_call(network: Weighing) -> None:
    """Tensors made in inference mode do not count their changes: only comparing them tells."""
    tables = [torch.ones(4) for _ in range(2)]
    run_batch([weighed(network, table) for table in tables])
    tables[1] += 1
    calls = [weighed(network, table) for table in tables]
    assert [answer[0, 0].item() for answer, _ in run_batch(calls)] == [4.0, 8.0]
    later = [weighed(network, table) for table in tables]
    assert later[0].key != later[1].key


def test_a_digest_is_made_once_per_tensor(network: Weighing) -> None:
    table = torch.ones(4)
    key = weighed(network, table).key
    table += 1
    assert weighed(network, table).key == key
    assert weighed(network, table.clone()).key != key


def test_calls_with_adapters_and_without_share_a_batch_and_keep_their_order(network: Weighing) -> None:
    double, triple = Scaling(network, 2.0), Scaling(network, 3.0)
    carried = [double, None, triple, None, Scaling(network, 2.0)]
    calls = [forward(network, 10.0 * (i + 1), adapter, 1 + i % 2) for i, adapter in enumerate(carried)]
    assert len({call.key for call in calls}) == 1
    answers = [answer for answer, _ in run_batch(calls)]
    assert [answer[0, 0].item() for answer in answers] == [20.0, 20.0, 90.0, 40.0, 100.0]
    assert [len(answer) for answer in answers] == [1, 2, 1, 2, 1]
    assert double.runs == [[2, 4, 1]]
    assert network.rows == [7]


def test_a_batch_without_adapters_runs_on_the_network_itself(network: Weighing) -> None:
    double = Scaling(network, 2.0)
    calls = [forward(network, 1.0, adapter) for adapter in (None, None, double)]
    run_batch(calls[:2])
    assert double.runs == []
    assert [answer[0, 0].item() for answer, _ in run_batch(calls)] == [1.0, 1.0, 2.0]
    assert calls[2].run()[0][0, 0].item() == 2.0


def test_rows_that_cannot_be_told_apart_run_apart(network: Weighing) -> None:
    carried = [Scaling(network, 2.0, can_mix=False), None, Scaling(network, 3.0, can_mix=False), None]
    calls = [forward(network, 1.0, adapter) for adapter in carried]
    assert [answer[0, 0].item() for answer, _ in run_batch(calls)] == [2.0, 1.0, 3.0, 1.0]
    assert network.rows == [1, 2, 1]


def test_adapters_that_keep_to_themselves_have_keys_of_their_own(network: Weighing) -> None:
    keys = [
        forward(network, 1.0, adapter).key
        for adapter in (None, Scaling(network, 2.0, company="two"), Scaling(network, 3.0, company="three"))
    ]
    assert len(set(keys)) == 3


def test_networks_of_one_build_cost_alike_and_share_no_batch(network: Weighing) -> None:
    call, other, double = (sample(1.0), torch.tensor(1)), Weighing(), Weighing().double()
    for each in (network, other, double):
        each.weight = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64 if each is double else torch.float32))
    own, same, different = (Forward(entry(each), call, {}) for each in (network, other, double))
    assert own.key != same.key
    assert own.cost_key == same.cost_key != different.cost_key
    scaled = forward(network, 1.0, Scaling(network, 2.0, company="two"))
    assert own.kind == scaled.kind != scaled.cost_key
    assert scaled.bare().key == own.key


def test_entries_made_twice_into_one_network_are_the_same_and_into_another_are_not(network: Weighing) -> None:
    call = (sample(1.0), torch.tensor(1))
    assert Forward(entry(network), call, {}).key == Forward(entry(network), call, {}).key
    assert Forward(entry(network), call, {}).key != Forward(entry(Weighing()), call, {}).key
