"""The denoiser over gRPC: progress, results, refusals, and what becomes of a call that was left."""

import asyncio
import shutil
import threading
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from darkroom.errors import InvalidTensor, QueueFull, Stalled, UnknownHolder
from darkroom.models.previews import PreviewMap, save_map
from darkroom.models.tensors import to_raw, to_torch
from darkroom.v1 import denoiser_pb2, denoiser_pb2_grpc, tensor_pb2
from darkroom.wire.status import from_rpc_error
from darkroom.wire.tensors import RawTensor, RemoteTensor, digest_of, parse_tensor, ref_message, value_message
from tests.services.neighbours import MODEL, SIZE_PX, Neighbours, RunningStage, engine_held, eventually, failure_of

WIDTH = 32
TOKENS = 32
PROMPT, NEGATIVE = torch.randn(2, 1, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))
MANY_STEPS = 900


def named(name: str, tensor: torch.Tensor) -> tensor_pb2.NamedTensor:
    return tensor_pb2.NamedTensor(name=name, tensor=value_message(to_raw(tensor)))


GOOD = [named("prompt_embeds", PROMPT), named("negative_prompt_embeds", NEGATIVE)]


def denoise_request(**changes: Any) -> denoiser_pb2.DenoiseRequest:
    good = {
        "model_id": MODEL, "embeddings": GOOD, "width_px": SIZE_PX, "height_px": SIZE_PX, "step_count": 4,
        "guidance_scale": 4.0, "seed": 7, "image_count": 1,
    }  # fmt: skip
    return denoiser_pb2.DenoiseRequest(**{**good, **changes})


def start(stage: RunningStage, **changes: Any) -> Any:
    return denoiser_pb2_grpc.DenoiserServiceStub(stage.channel).Denoise(denoise_request(**changes), timeout=30.0)


async def finish(call: Any) -> denoiser_pb2.DenoiseResult:
    events = [event async for event in call]
    result: denoiser_pb2.DenoiseResult = events[-1].result
    return result


def latents(result: denoiser_pb2.DenoiseResult) -> torch.Tensor:
    raw = parse_tensor("latents", result.latents)
    assert isinstance(raw, RawTensor)
    return to_torch(raw)


def distance(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left - right).norm() / right.norm())


async def check_runs_alone(stage: RunningStage) -> None:
    """Draws once more: whatever else were still alive would share batches with it."""
    result = await finish(start(stage))
    assert latents(result).isfinite().all()
    assert (result.forward_count, result.batched_forward_count) == (4, 0)


async def test_progress_comes_after_each_step_and_the_result_last(neighbours: Neighbours) -> None:
    denoiser = await neighbours.stage("denoiser")
    events = [event async for event in start(denoiser, step_count=5)]
    assert [event.WhichOneof("event") for event in events] == ["progress"] * 5 + ["result"]
    assert [(event.progress.step, event.progress.step_count) for event in events[:-1]] == [(i, 5) for i in range(1, 6)]
    assert latents(events[-1].result).shape == (1, 4, 16, 16)
    assert (events[-1].result.forward_count, events[-1].result.batched_forward_count) == (5, 0)


async def test_requests_at_the_same_time_share_batches_and_a_deterministic_one_does_not(neighbours: Neighbours) -> None:
    denoiser = await neighbours.stage("denoiser")
    async with engine_held(denoiser):
        calls = [asyncio.create_task(finish(start(denoiser, seed=seed, deterministic=seed == 0))) for seed in range(3)]
        await eventually(lambda: denoiser.running_count == 3)
        await asyncio.sleep(0.05)
    results = await asyncio.gather(*calls)
    assert [result.batched_forward_count > 0 for result in results] == [False, True, True]
    alone = await finish(start(denoiser, seed=0, deterministic=True))
    assert torch.equal(latents(results[0]), latents(alone))


async def test_several_images_are_those_of_successive_seeds(neighbours: Neighbours) -> None:
    denoiser = await neighbours.stage("denoiser")
    together = latents(await finish(start(denoiser, image_count=3)))
    assert together.shape == (3, 4, 16, 16)
    for row, seed in enumerate((7, 8, 9)):
        alone = latents(await finish(start(denoiser, seed=seed)))
        assert distance(together[row : row + 1], alone) <= 1e-5
    assert distance(together[:1], together[1:2]) > 0.1


async def test_cancelling_a_call_stops_its_program_and_frees_its_slot(neighbours: Neighbours) -> None:
    denoiser = await neighbours.stage("denoiser", max_running=1)
    call = start(denoiser, step_count=MANY_STEPS)
    async for event in call:
        if event.progress.step == 2:
            break
    call.cancel()
    await eventually(lambda: denoiser.running_count == 0)
    assert denoiser.forward_count < MANY_STEPS
    await check_runs_alone(denoiser)


async def test_a_call_that_is_cancelled_before_its_turn_costs_nothing(neighbours: Neighbours) -> None:
    denoiser = await neighbours.stage("denoiser")
    async with engine_held(denoiser):
        call = start(denoiser)
        await eventually(lambda: denoiser.running_count == 1)
        call.cancel()
        await eventually(lambda: denoiser.running_count == 0)
    await check_runs_alone(denoiser)
    assert denoiser.forward_count == 4


async def test_a_full_denoiser_says_when_to_come_back(neighbours: Neighbours) -> None:
    denoiser = await neighbours.stage("denoiser", max_running=1)
    async with engine_held(denoiser):
        first = asyncio.create_task(finish(start(denoiser)))
        await eventually(lambda: denoiser.running_count == 1)
        error = await failure_of(start(denoiser))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    refused = from_rpc_error(error, "denoiser")
    assert isinstance(refused, QueueFull)
    assert refused.facts["limit"] == "1"
    status = rpc_status.from_call(error)  # type: ignore[arg-type]  # the stubs know no aio
    assert status is not None
    retry = error_details_pb2.RetryInfo()
    assert any(detail.Unpack(retry) for detail in status.details)
    assert retry.retry_delay.ToSeconds() == 1
    assert latents(await first).isfinite().all()
    assert latents(await finish(start(denoiser))).isfinite().all()


BAD_EMBEDDINGS = {
    "too narrow": ([named("prompt_embeds", PROMPT[..., :7]), GOOD[1]], "prompt_embeds", "width 7"),
    "too wide": (
        [GOOD[0], named("negative_prompt_embeds", torch.zeros(1, 32, 64))],
        "negative_prompt_embeds",
        "width 64",
    ),
    "not finite": ([named("prompt_embeds", PROMPT * torch.nan), GOOD[1]], "prompt_embeds", "not finite"),
    "infinite": ([GOOD[0], named("negative_prompt_embeds", NEGATIVE / 0)], "negative_prompt_embeds", "not finite"),
    "whole numbers": ([named("prompt_embeds", PROMPT.int()), GOOD[1]], "prompt_embeds", "floating point"),
    "one missing": ([GOOD[0]], "negative_prompt_embeds", "missing"),
    "given twice": ([GOOD[0], GOOD[0]], "prompt_embeds", "twice"),
    "unknown name": ([*GOOD, named("image_embeds", PROMPT)], "image_embeds", "not an embedding of this model"),
    "unknown and long": ([*GOOD, named("x" * 5000, PROMPT)], "x" * 64, "not an embedding of this model"),
    "two rows": ([named("prompt_embeds", PROMPT.repeat(2, 1, 1)), GOOD[1]], "prompt_embeds", "shape [1, ...]"),
    "no dimension": ([named("prompt_embeds", PROMPT.sum()), GOOD[1]], "prompt_embeds", "shape [1, ...]"),
    "two dimensions": ([named("prompt_embeds", PROMPT[:, 0]), GOOD[1]], "prompt_embeds", "shape [1, ...]"),
    "four dimensions": ([named("prompt_embeds", PROMPT[None]), GOOD[1]], "prompt_embeds", "shape [1, ...]"),
    "lengths differ": ([named("prompt_embeds", PROMPT[:, :5]), GOOD[1]], "negative_prompt_embeds", "has shape"),
}


@pytest.mark.parametrize("case", BAD_EMBEDDINGS)
async def test_bad_embeddings_are_refused_by_name(neighbours: Neighbours, case: str) -> None:
    embeddings, tensor, problem = BAD_EMBEDDINGS[case]
    denoiser = await neighbours.stage("denoiser")
    error = await failure_of(start(denoiser, embeddings=embeddings))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    refused = from_rpc_error(error, "denoiser")
    assert isinstance(refused, InvalidTensor)
    assert refused.facts["tensor"] == tensor
    assert problem in refused.message
    assert denoiser.forward_count == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
async def test_embeddings_of_another_precision_are_taken(neighbours: Neighbours, dtype: torch.dtype) -> None:
    denoiser = await neighbours.stage("denoiser")
    embeddings = [named("prompt_embeds", PROMPT.to(dtype)), named("negative_prompt_embeds", NEGATIVE.to(dtype))]
    other, own = [latents(await finish(start(denoiser, embeddings=e))) for e in (embeddings, GOOD)]
    assert distance(other, own) < 0.1


@pytest.mark.parametrize(
    ("field", "value"), [("width_px", 33), ("width_px", 36), ("height_px", 44), ("scheduler", "flow_euler")]
)
async def test_what_the_model_cannot_do_is_refused_by_field(neighbours: Neighbours, field: str, value: object) -> None:
    denoiser = await neighbours.stage("denoiser")
    error = await failure_of(start(denoiser, **{field: value}))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert str(error.details()).startswith(f"{field} ")


async def test_an_embedding_held_by_a_stranger_is_refused(neighbours: Neighbours) -> None:
    denoiser = await neighbours.stage("denoiser")
    raw = to_raw(PROMPT)
    ref = ref_message(RemoteTensor(raw.element_type, raw.shape, digest_of(raw.data), "169.254.169.254:80", 0.0))
    error = await failure_of(start(denoiser, embeddings=[tensor_pb2.NamedTensor(name="prompt_embeds", tensor=ref)]))
    assert isinstance(from_rpc_error(error, "denoiser"), UnknownHolder)
    assert "169.254" not in str(error.details())


async def test_a_step_cache_saves_forwards_and_is_resumed_with_the_same_decisions(neighbours: Neighbours) -> None:
    denoiser = await neighbours.stage("denoiser")
    changes = {"step_count": 25, "step_cache_threshold": 0.3, "deterministic": True}
    made = {}
    async for event in start(denoiser, checkpoint_interval=1, **changes):
        if event.HasField("progress"):
            made[event.progress.step] = event.progress.checkpoint
    whole = event.result
    assert whole.cached_forward_count >= 5
    assert whole.forward_count + whole.cached_forward_count == 25
    exact = await finish(start(denoiser, step_count=25, deterministic=True))
    assert 0 < distance(latents(whole), latents(exact)) < 0.2
    for step in (3, 9, 17):
        rest = await finish(start(denoiser, checkpoint=made[step], **changes))
        assert torch.equal(latents(rest), latents(whole))
        assert rest.cached_forward_count == whole.cached_forward_count
        assert rest.forward_count < whole.forward_count


async def test_the_last_preview_is_the_picture_of_the_finished_latents(tiny_store: Path, tmp_path: Path) -> None:
    """With a solver that ends without noise, as DDIM does."""
    shutil.copytree(tiny_store / MODEL, tmp_path / MODEL)
    noise = torch.Generator().manual_seed(5)
    preview_map = PreviewMap(torch.randn(4, 3, generator=noise) / 8, torch.full((3,), 0.5))
    save_map(preview_map, tmp_path / MODEL)
    async with Neighbours(tmp_path) as neighbours:
        denoiser = await neighbours.stage("denoiser")
        previews = {}
        async for event in start(denoiser, step_count=12, image_count=2, preview_interval=4):
            if event.progress.previews:
                previews[event.progress.step] = [preview.data for preview in event.progress.previews]
        finished = latents(event.result)
    assert sorted(previews) == [4, 8, 12]
    assert previews[12] == preview_map.draw(finished)
    assert len(previews[4]) == 2
    assert previews[4] != previews[8]


async def test_no_preview_comes_of_a_model_without_a_map(neighbours: Neighbours) -> None:
    denoiser = await neighbours.stage("denoiser")
    async for event in start(denoiser, preview_interval=1):
        assert not event.progress.previews


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("step_cache_threshold", 1.5),
        ("step_cache_threshold", float("nan")),
        ("preview_interval", -1),
        ("frame_count", -1),
    ],
)
async def test_settings_out_of_range_are_refused_by_field(neighbours: Neighbours, field: str, value: object) -> None:
    denoiser = await neighbours.stage("denoiser")
    error = await failure_of(start(denoiser, **{field: value}))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert str(error.details()).startswith(f"{field} ")


async def test_an_engine_that_does_not_come_back_gives_its_requests_up(neighbours: Neighbours) -> None:
    denoiser = await neighbours.stage("denoiser")
    await finish(start(denoiser))  # from now on it is known how long a step takes
    watching = asyncio.create_task(denoiser.replica.watch())
    network, may_go = (await denoiser.replica.part(MODEL)).networks["unet"], threading.Event()
    hook = network.register_forward_pre_hook(lambda *_: may_go.wait(30) and None)
    try:
        error = await failure_of(start(denoiser))
        assert isinstance(from_rpc_error(error, "denoiser"), Stalled)
        with pytest.raises(Stalled):
            await watching
    finally:
        hook.remove()
        may_go.set()
