"""The step cache: which forwards are answered, with what, and that a request's history is its own."""

import itertools
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch.utils._python_dispatch import TorchDispatchMode

from darkroom.errors import InvalidCheckpoint
from darkroom.models.executor import Executor
from darkroom.models.standins import Batched
from darkroom.models.stepcache import (
    FIRST_COUNT,
    LAST_COUNT,
    MAX_ANSWERED_IN_A_ROW,
    MAX_STREAMS,
    Cached,
    Call,
    StepCache,
)
from darkroom.models.trees import from_tree, to_tree
from tests.tiny_models import TINY_MODELS

STEPS = 20


def walk(cache: StepCache, output: Callable[[int], Any], steps: range | None = None, count: int = STEPS) -> list[int]:
    """Calls a network whose sample moves by one part in a hundred per step. Returns the steps at which it ran."""
    ran = []
    for step in steps or range(count):
        call = Call("unet", (torch.full((2, 3), 1 + step / 100),), step, count)
        if cache.answer(call) is None:
            ran.append(step)
            cache.note(call, output(step))
    return ran


def line(step: int) -> tuple[torch.Tensor]:
    return (torch.tensor([[1.0, 2.0], [3.0, -4.0]]) * (1 + step / 100),)


def passed_on(state: dict[str, Any]) -> dict[str, Any]:
    """A state after its way through a checkpoint."""
    tensors: dict[str, torch.Tensor] = {}
    tree = json.loads(json.dumps(to_tree(state, tensors)))
    answer: dict[str, Any] = from_tree(tree, tensors, torch.device("cpu"))
    return answer


def draw(threshold: float | None, scheduler: str = "", steps: int = 12) -> tuple[torch.Tensor, StepCache, int]:
    """Latents of a plain tiny pipeline, over a cached UNet unless None; and how often the UNet itself ran."""
    torch.manual_seed(3)
    pipeline = TINY_MODELS["tiny-sd"]()
    if scheduler == "dpmpp_2m":
        pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    cache, counter, unet, ran = StepCache(threshold or 0.0), itertools.count(), pipeline.unet, [0]
    unet.register_forward_hook(lambda *_: ran.__setitem__(0, ran[0] + 1))
    if threshold is not None:
        pipeline.unet = Cached(unet, "unet", cache, lambda: (next(counter), steps))
    latents = pipeline(
        "a red circle",
        num_inference_steps=steps,
        guidance_scale=4.0,
        width=32,
        height=32,
        generator=torch.Generator().manual_seed(1),
        output_type="latent",
    ).images
    return latents, cache, ran[0]


def test_off_it_changes_no_bit_and_keeps_nothing() -> None:
    expected, _, _ = draw(None)
    latents, cache, ran = draw(0.0)
    assert torch.equal(latents, expected)
    assert (ran, cache.size_bytes, cache.counts.answered) == (12, 0, 0)


@pytest.mark.parametrize("scheduler", ["", "dpmpp_2m"])
def test_on_it_saves_forwards_counts_them_and_stays_close(scheduler: str) -> None:
    expected, _, _ = draw(0.0, scheduler)
    latents, cache, ran = draw(0.3, scheduler)
    assert cache.counts.answered > 0
    assert cache.counts.computed == ran == 12 - cache.counts.answered
    assert 0 < ((latents - expected).norm() / expected.norm()).item() < 0.05


def test_the_first_and_last_steps_always_run_and_few_in_a_row_are_answered() -> None:
    ran = walk(StepCache(1e9), line)
    assert ran[:FIRST_COUNT] == list(range(FIRST_COUNT))
    assert ran[-LAST_COUNT:] == list(range(STEPS - LAST_COUNT, STEPS))
    assert max(b - a - 1 for a, b in itertools.pairwise(ran)) == MAX_ANSWERED_IN_A_ROW


def test_a_higher_threshold_answers_more() -> None:
    computed = [len(walk(StepCache(threshold), line)) for threshold in (0.001, 0.025, 0.035, 1.0)]
    assert computed == sorted(computed, reverse=True)
    assert computed[0] == STEPS > computed[1] > computed[2]


def test_what_moves_on_a_line_is_extrapolated_exactly() -> None:
    cache, answered = StepCache(1.0), 0
    for step in range(STEPS):
        call = Call("unet", (torch.full((2, 3), 1 + step / 100),), step, STEPS)
        answer = cache.answer(call)
        if answer is None:
            cache.note(call, line(step))
        else:
            answered += 1
            torch.testing.assert_close(answer, line(step))
    assert answered > 5


def test_what_jitters_is_reused_and_not_extrapolated() -> None:
    """A slope that was wrong at the last computed forward gets weight 0: the answer is that forward's."""
    cache = StepCache(1e9)
    for step in range(FIRST_COUNT):
        call = Call("unet", (torch.full((2, 3), float(step)),), step, STEPS)
        assert cache.answer(call) is None
        cache.note(call, (torch.full((2, 2), 5.0 + step % 2),))
    answer = cache.answer(Call("unet", (torch.full((2, 3), 3.0),), FIRST_COUNT, STEPS))
    assert answer is not None
    assert torch.equal(answer[0], torch.full((2, 2), 5.0))


def test_it_refreshes_when_the_sample_leaps() -> None:
    cache = StepCache(0.1)
    walk(cache, line, range(FIRST_COUNT))
    near = Call("unet", (torch.full((2, 3), 1.03),), FIRST_COUNT, STEPS)
    far = Call("unet", (torch.full((2, 3), 3.0),), FIRST_COUNT + 1, STEPS)
    assert cache.answer(near) is not None
    assert cache.answer(far) is None


def test_it_refreshes_when_the_output_turned_quick() -> None:
    """The rate of the newest computed forwards decides: a jump in the output stops answering at once."""
    slow, quick = StepCache(0.1), StepCache(0.1)
    walk(slow, line, range(FIRST_COUNT))
    walk(quick, lambda step: line(step if step < FIRST_COUNT - 1 else 500), range(FIRST_COUNT))
    ran = [walk(cache, line, range(FIRST_COUNT, FIRST_COUNT + 1)) for cache in (slow, quick)]
    assert ran == [[], [FIRST_COUNT]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_none_make_the_network_run(bad: float) -> None:
    last = FIRST_COUNT - 1
    cache = StepCache(0.5)
    walk(cache, lambda step: line(step) if step != last else (torch.full((2, 2), bad),), range(FIRST_COUNT))
    assert walk(cache, line, range(FIRST_COUNT, FIRST_COUNT + 1)) == [FIRST_COUNT]
    cache = StepCache(0.5)
    walk(cache, line, range(FIRST_COUNT))
    assert cache.answer(Call("unet", (torch.full((2, 3), bad),), FIRST_COUNT, STEPS)) is None


def test_it_answers_again_once_the_numbers_are_back() -> None:
    cache, answered = StepCache(0.5), []
    for step in range(STEPS):
        call = Call("unet", (torch.full((2, 3), 1 + step / 100),), step, STEPS)
        answer = cache.answer(call)
        if answer is None:
            cache.note(call, line(step) if step != 1 else (torch.full((2, 2), float("nan")),))
        else:
            answered.append(answer[0])
    assert len(answered) > 5
    assert all(bool(torch.isfinite(answer).all()) for answer in answered)


def test_a_sample_that_stands_still_is_no_error() -> None:
    cache = StepCache(0.5)
    for step in range(8):
        call = Call("unet", (torch.ones(2, 3),), step, STEPS)
        assert cache.answer(call) is None
        cache.note(call, line(step))


def test_two_networks_and_two_calls_of_a_step_have_their_own_histories() -> None:
    cache = StepCache(1.0)
    values = {("one", 0): 1.0, ("one", 1): -7.0, ("two", 0): 100.0}
    answered = 0
    for step in range(STEPS):
        for (network, _), value in values.items():
            call = Call(network, (torch.full((2, 3), 1 + step / 100),), step, STEPS)
            answer = cache.answer(call)
            expected = value * (1 + step / 100)
            if answer is None:
                cache.note(call, torch.full((2, 2), expected))
            else:
                answered += 1
                torch.testing.assert_close(answer, torch.full((2, 2), expected))
    assert answered > 10


def test_the_calls_of_a_step_share_its_verdict() -> None:
    """The second call's output changes wildly; on its own it would never be answered."""
    cache, verdicts = StepCache(0.05), []
    for step in range(STEPS):
        step_verdicts = []
        for ordinal in range(2):
            call = Call("unet", (torch.full((2, 3), 1 + step / 100),), step, STEPS)
            answer = cache.answer(call)
            step_verdicts.append(answer is not None)
            if answer is None:
                cache.note(call, torch.full((2, 2), 1.0 if ordinal == 0 else (-1.0) ** step) * (1 + step / 100))
        verdicts.append(step_verdicts)
    assert all(first == second for first, second in verdicts)
    assert any(first for first, _ in verdicts)


def test_a_network_that_joins_later_runs_until_it_has_a_history() -> None:
    """Two experts: the second takes over half way, and nothing of the first one's is passed off as its answer."""
    cache, ran = StepCache(1.0), []
    for step in range(STEPS):
        network = "first" if step < 10 else "second"
        call = Call(network, (torch.full((2, 3), 1 + step / 100),), step, STEPS)
        if cache.answer(call) is None:
            ran.append(step)
            cache.note(call, line(step))
    assert set(range(10, 10 + FIRST_COUNT)) <= set(ran)


def test_another_shape_begins_a_new_history() -> None:
    cache = StepCache(1.0)
    walk(cache, line, range(5))
    assert cache.answer(Call("unet", (torch.ones(2, 4),), 5, STEPS)) is None


@pytest.mark.parametrize("leave_at", range(1, 16))
def test_after_a_resume_it_decides_and_answers_bit_for_bit_the_same(leave_at: int) -> None:
    def run(*, resume: bool) -> tuple[list[int], torch.Tensor]:
        cache, sample, ran = StepCache(0.12), torch.linspace(-1, 2, 12).reshape(2, 6), []
        for step in range(STEPS):
            if resume and step == leave_at:
                state, cache = passed_on(cache.state()), StepCache(0.12)
                cache.load(state)
            call = Call("unet", (sample,), step, STEPS)
            answer = cache.answer(call)
            if answer is None:
                ran.append(step)
                answer = UNet2DConditionOutput(sample=torch.sin(sample * (1 + 0.05 * step)))
                cache.note(call, answer)
            sample = sample + 0.05 * answer.sample
            assert torch.equal(answer[0], answer.sample)
        return ran, sample

    (ran, sample), (resumed_ran, resumed_sample) = run(resume=False), run(resume=True)
    assert FIRST_COUNT + LAST_COUNT < len(ran) < STEPS
    assert ran == resumed_ran
    assert torch.equal(sample, resumed_sample)


def test_answers_keep_their_structure_and_what_is_no_tensor() -> None:
    def output(step: int) -> Any:
        return ([torch.full((2, 2), 1.0 + step / 100), {"mid": torch.full((2,), 2.0)}], 7, None, torch.tensor([step]))

    cache = StepCache(1.0)
    walk(cache, output, range(FIRST_COUNT))
    for other in (cache, StepCache(1.0)):
        other.load(passed_on(cache.state()))
        answer = other.answer(Call("unet", (torch.full((2, 3), 1.03),), FIRST_COUNT, STEPS))
        assert answer is not None
        (first, nested), seven, nothing, whole = answer
        torch.testing.assert_close(first, torch.full((2, 2), 1.03))
        assert (nested["mid"].shape, seven, nothing, whole.tolist()) == ((2,), 7, None, [FIRST_COUNT - 1])


@pytest.mark.parametrize(
    "change",
    [
        {"streams": 3},
        {"computed": "many"},
        {"steps": [3, 3]},
        {"steps": [1, 2, 3]},
        {"outputs": [[torch.ones(2, 2)], [torch.ones(3, 2)]]},
        {"sample": []},
        {"structure": {"leaf": 9}},
        {"structure": {"class": "os.system"}},
        {"weight": 0.5},
        {"rate": None},
    ],
)
def test_a_state_that_is_none_is_refused(change: dict[str, Any]) -> None:
    cache = StepCache(1.0)
    walk(cache, line, range(5))
    state = cache.state()
    if set(change) <= set(state):
        state |= change
    else:
        state["streams"][0] |= change
    with pytest.raises(InvalidCheckpoint):
        StepCache(1.0).load(state)


def test_memory_is_two_outputs_and_a_sample_and_no_batch_is_kept_alive() -> None:
    cache = StepCache(0.5)
    sizes = []
    for step in range(STEPS):
        call = Call("unet", (torch.full((2, 3), 1 + step / 100),), step, STEPS)
        if cache.answer(call) is None:
            whole_batch = torch.ones(64, 5)
            cache.note(call, (whole_batch[:2],))
        sizes.append(cache.size_bytes)
    assert max(sizes) == sizes[-1] == 4 * (2 * 2 * 5 + 2 * 3)
    kept = cache.state()["streams"][0]["outputs"]
    assert all(leaf.untyped_storage().nbytes() == 4 * 10 for output in kept for leaf in output)


def test_a_pipeline_that_calls_many_times_a_step_is_remembered_in_part() -> None:
    cache = StepCache(0.5)
    for step in range(5):
        for _ in range(3 * MAX_STREAMS):
            call = Call("unet", (torch.full((2, 3), 1 + step / 100),), step, STEPS)
            if cache.answer(call) is None:
                cache.note(call, line(step))
    assert len(cache.state()["streams"]) == MAX_STREAMS


def test_a_decision_reads_one_number_from_the_device() -> None:
    reads: list[str] = []

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten._local_scalar_dense.default:
                reads.append(str(func))
            return func(*args, **(kwargs or {}))

    cache = StepCache(0.05)
    with Reads():  # type: ignore[no-untyped-call]
        walk(cache, line)
    assert 0 < len(reads) <= STEPS - FIRST_COUNT - LAST_COUNT


@pytest.mark.parametrize("threshold", [-0.1, float("nan"), float("inf")])
def test_a_threshold_that_is_none_is_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match="threshold"):
        StepCache(threshold)


def test_the_sample_is_found_by_name_or_place() -> None:
    sample, text = torch.ones(1), torch.zeros(2)
    of = partial(Call.of, "net", step=0, step_count=1)
    for args, kwargs in (
        ((sample, 3), {"encoder_hidden_states": text}),
        ((), {"encoder_hidden_states": text, "hidden_states": sample}),
        ((3.0, [sample, sample]), {}),
        ((), {"x": sample, "t": text}),
    ):
        assert of(args, kwargs).sample[0] is sample
    assert of((3,), {}).sample == ()


class Half(torch.nn.Module):
    """Halves its input row by row, and notes the rows of each call."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> tuple[torch.Tensor]:
        self.rows.append(len(sample))
        return (sample / 2 + 0 * timestep.reshape(-1, 1),)


def test_in_one_executor_an_answered_request_misses_a_batch_and_the_others_do_not_notice() -> None:
    network = Half()
    shared = Batched(network, "half")

    def program(start: float, threshold: float) -> tuple[torch.Tensor, StepCache]:
        cache, done = StepCache(threshold), [0]
        own = Cached(shared, "half", cache, lambda: (done[0], STEPS))
        sample = torch.full((2, 3), start)
        for step in range(STEPS):
            sample = sample - 0.05 * own(sample, torch.tensor(step))[0]
            done[0] = step + 1
        return sample, cache

    def run(thresholds: list[float]) -> list[tuple[torch.Tensor, StepCache]]:
        executor = Executor(max_batch_rows=16)
        futures = [executor.submit(partial(program, 1.0 + i, t))[0] for i, t in enumerate(thresholds)]
        results = [future.result(30) for future in futures]
        executor.close()
        return results

    plain = run([0.0, 0.0, 0.0, 0.0])
    uncached_rows, network.rows = sum(network.rows), []
    mixed = run([0.0, 0.2, 0.0, 0.2])
    for i in (0, 2):
        assert torch.equal(mixed[i][0], plain[i][0])
    for i in (1, 3):
        assert mixed[i][1].counts.answered > 3
        torch.testing.assert_close(mixed[i][0], plain[i][0], rtol=1e-3, atol=1e-3)
    assert sum(network.rows) == uncached_rows - 2 * sum(cache.counts.answered for _, cache in mixed)
    assert max(network.rows) > 2
