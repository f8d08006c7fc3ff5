"""Checkpoints over gRPC: any replica goes on from them, bit for bit; what is none of the request's is refused."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import torch

from darkroom.errors import DarkroomError, InvalidCheckpoint, Moved, StaleEpoch, UnusableCheckpoint
from darkroom.v1 import checkpoint_pb2, denoiser_pb2
from darkroom.wire.checkpoints import Checkpoint, checkpoint_message, parse_checkpoint
from darkroom.wire.status import from_rpc_error
from tests.services.neighbours import Neighbours, RunningStage, engine_held, eventually, failure_of
from tests.services.test_denoiser import finish, latents, start

STEPS = 9


async def checkpoints(stage: RunningStage, **changes: Any) -> tuple[dict[int, checkpoint_pb2.Checkpoint], torch.Tensor]:
    """Runs a request to its end. Returns its checkpoints by step, and its latents."""
    found, result = {}, None
    async for event in start(
        stage, **{"step_count": STEPS, "checkpoint_interval": 1, "deterministic": True, **changes}
    ):
        if event.HasField("progress"):
            assert event.progress.checkpoint.step == event.progress.step
            found[event.progress.step] = event.progress.checkpoint
        else:
            result = latents(event.result)
    assert result is not None
    return found, result


async def refused(stage: RunningStage, **changes: Any) -> DarkroomError:
    error = from_rpc_error(await failure_of(start(stage, step_count=STEPS, deterministic=True, **changes)), "denoiser")
    assert error is not None
    return error


@pytest.mark.parametrize("scheduler", ["", "euler_a", "dpmpp_2m_sde", "heun", "unipc", "pndm"])
async def test_another_replica_goes_on_where_the_first_was(neighbours: Neighbours, scheduler: str) -> None:
    one, two = await neighbours.stage("denoiser", 1), await neighbours.stage("denoiser", 2)
    made, whole = await checkpoints(one, scheduler=scheduler)
    result = await finish(
        start(two, step_count=STEPS, deterministic=True, scheduler=scheduler, checkpoint=made[4], epoch=1)
    )
    assert torch.equal(latents(result), whole)
    assert result.forward_count == one.forward_count - 4


async def test_no_checkpoints_come_unless_they_are_asked_for(neighbours: Neighbours) -> None:
    stage = await neighbours.stage("denoiser")
    async for event in start(stage):
        assert not event.progress.HasField("checkpoint")


async def test_large_checkpoints_come_at_the_interval_only(neighbours: Neighbours) -> None:
    """Ten images of 128 px, with the solver's prediction, are 1.3 MB."""
    stage = await neighbours.stage("denoiser")
    seen = [
        event.progress.step
        async for event in start(
            stage, step_count=7, checkpoint_interval=3, image_count=10, width_px=128, height_px=128, guidance_scale=1.0
        )
        if event.progress.HasField("checkpoint")
    ]
    assert seen == [1, 3, 6]


async def test_a_replica_that_goes_down_hands_its_requests_back_with_their_last_step(neighbours: Neighbours) -> None:
    one, two = await neighbours.stage("denoiser", 1), await neighbours.stage("denoiser", 2)
    _, whole = await checkpoints(two, step_count=200)
    last = checkpoint_pb2.Checkpoint()

    async def follow() -> None:
        async for event in start(one, step_count=200, checkpoint_interval=1, deterministic=True):
            last.CopyFrom(event.progress.checkpoint)
            if event.progress.step == 5:
                one.replica.hand_back()

    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await follow()
    assert isinstance(from_rpc_error(failure.value, "denoiser"), Moved)
    assert one.forward_count - last.step in (0, 1)  # the step that was being done at most
    rest = await finish(start(two, step_count=200, deterministic=True, checkpoint=last))
    assert torch.equal(latents(rest), whole)
    assert rest.forward_count == 200 - last.step


@pytest.mark.parametrize("from_step", [0, 4], ids=["its own", "another model's"])
async def test_a_checkpoint_that_was_not_gone_on_from_is_not_sent_back(neighbours: Neighbours, from_step: int) -> None:
    """Another model's would come back as the request's own, with that model's solver and noise."""
    one, two = await neighbours.stage("denoiser", 1), await neighbours.stage("denoiser", 2)
    made, _ = await checkpoints(one)
    two.replica.hand_back()
    call = start(
        two, step_count=STEPS, checkpoint_interval=1, deterministic=True, checkpoint=made[4], from_step=from_step
    )

    async def follow() -> AsyncIterator[denoiser_pb2.DenoiseResponse]:
        async for event in call:
            assert not event.HasField("progress")
            yield event

    assert isinstance(from_rpc_error(await failure_of(follow()), "denoiser"), Moved)


async def test_a_replica_that_goes_down_finishes_what_nobody_can_take_over(neighbours: Neighbours) -> None:
    stage = await neighbours.stage("denoiser")
    async with engine_held(stage):
        call = asyncio.create_task(finish(start(stage)))
        await eventually(lambda: stage.running_count == 1)
        stage.replica.hand_back()
    assert latents(await call).isfinite().all()


async def test_a_range_stops_at_its_last_step_and_another_model_takes_its_latents_over(neighbours: Neighbours) -> None:
    stage = await neighbours.stage("denoiser")
    made, whole = await checkpoints(stage)
    half, stopped = await checkpoints(stage, to_step=4)
    assert sorted(half) == [1, 2, 3, 4]
    assert torch.equal(stopped, _outputs(half[4]))
    assert torch.equal(stopped, _outputs(made[4]))
    again = await finish(start(stage, step_count=STEPS, deterministic=True, checkpoint=half[4], to_step=4))
    assert torch.equal(latents(again), stopped)  # its replica died before it could say so
    assert again.forward_count == 0
    rest = latents(await finish(start(stage, step_count=STEPS, deterministic=True, checkpoint=half[4], from_step=4)))
    assert torch.equal(rest, whole)  # the model's own solver, DDIM, keeps nothing but the latents
    other = await finish(
        start(stage, step_count=STEPS, deterministic=True, checkpoint=half[4], from_step=4, guidance_scale=1.0)
    )
    assert other.forward_count == STEPS - 4
    assert not torch.equal(latents(other), whole)


def _outputs(message: checkpoint_pb2.Checkpoint) -> torch.Tensor:
    name = json.loads(message.state_json)["outputs"]["tuple"][0]["tensor"]
    tensor = next(named.tensor for named in message.tensors if named.name == name)
    return latents(denoiser_pb2.DenoiseResult(latents=tensor))


async def test_a_checkpoint_of_another_request_is_refused(neighbours: Neighbours) -> None:
    stage = await neighbours.stage("denoiser")
    made, _ = await checkpoints(stage)
    for changes in ({"seed": 8}, {"guidance_scale": 5.0}, {"scheduler": "euler"}, {"height_px": 64}):
        error = await refused(stage, checkpoint=made[4], **changes)
        assert isinstance(error, InvalidCheckpoint)
        assert error.message == "checkpoint belongs to another request"
    wrong_step = await refused(stage, checkpoint=made[4], from_step=5)
    assert "from_step is 5" in wrong_step.message
    assert (await refused(stage, checkpoint=made[4], to_step=3)).message.startswith("to_step")
    assert (await refused(stage, checkpoint=made[4], from_step=4, to_step=4)).message.startswith("to_step")


def forged(message: checkpoint_pb2.Checkpoint, **changes: Any) -> checkpoint_pb2.Checkpoint:
    """A sound message with other contents."""
    good = parse_checkpoint(message)
    fields = {name: getattr(good, name) for name in Checkpoint.__dataclass_fields__}
    return checkpoint_message(Checkpoint(**{**fields, **changes}))


async def test_a_checkpoint_made_by_other_versions_cannot_be_used(neighbours: Neighbours) -> None:
    stage = await neighbours.stage("denoiser")
    made, _ = await checkpoints(stage)
    error = await refused(stage, checkpoint=forged(made[4], made_by={"diffusers": "0.1"}))
    assert isinstance(error, UnusableCheckpoint)
    assert "diffusers 0.1" in error.message
    newer = checkpoint_pb2.Checkpoint()
    newer.CopyFrom(made[4])
    newer.format_version = 2
    assert isinstance(await refused(stage, checkpoint=newer), UnusableCheckpoint)


BAD_STATES: dict[str, Any] = {
    "no state": {},
    "solver is a list": {"solver": {"list": []}},
    "sets a method": {"solver": {"dict": {"set_timesteps": None}}},
    "sets the step": {"solver": {"dict": {"step": None}}},
    "sets the config": {"solver": {"dict": {"_internal_dict": None}}},
    "unknown kind": {"solver": {"dict": {"_step_index": {"code": "1"}}}},
    "missing tensor": {"solver": {"dict": {"sample": {"tensor": "t99", "type": "float32"}}}},
    "too deep": {"solver": {"dict": {"sample": json.loads('{"list":[' * 40 + "]}" * 40)}}},
    "no outputs": {"outputs": {"tuple": []}},
    "no generators": {"generators": {"list": []}},
    "latents as noise source": {"generators": {"list": [{"tensor": "t0", "type": "float32"}]}},
    "no shapes": {"shapes": {}},
    "shapes are no object": {"shapes": []},
    "huge shapes": {"shapes": {"unet": {"zeros": [1 << 40], "type": "float32"}}},
    "strange type": {"shapes": {"unet": {"zeros": [1], "type": "load"}}},
}


@pytest.mark.parametrize("case", BAD_STATES)
async def test_a_forged_state_is_refused_and_harms_nobody(neighbours: Neighbours, case: str) -> None:
    stage = await neighbours.stage("denoiser")
    made, whole = await checkpoints(stage)
    state = {**json.loads(made[4].state_json), **BAD_STATES[case]} if BAD_STATES[case] else {}
    error = await refused(stage, checkpoint=forged(made[4], state=state))
    assert isinstance(error, InvalidCheckpoint)
    rest = await finish(start(stage, step_count=STEPS, deterministic=True, checkpoint=made[4]))
    assert torch.equal(latents(rest), whole)


async def test_changed_bytes_and_latents_that_are_no_numbers_are_refused(neighbours: Neighbours) -> None:
    stage = await neighbours.stage("denoiser")
    made, _ = await checkpoints(stage)
    changed = checkpoint_pb2.Checkpoint()
    changed.CopyFrom(made[4])
    changed.tensors[0].tensor.data = bytes(len(changed.tensors[0].tensor.data))
    assert (await refused(stage, checkpoint=changed)).reason() == "DIGEST_MISMATCH"
    good = parse_checkpoint(made[4])
    name, tensor = next(iter(good.tensors.items()))
    poisoned = {**good.tensors, name: type(tensor)(tensor.element_type, tensor.shape, b"\xff" * len(tensor.data))}
    assert (await refused(stage, checkpoint=forged(made[4], tensors=poisoned))).reason() == "INVALID_TENSOR"


async def test_a_later_attempt_ends_an_earlier_one_and_not_the_other_way_round(neighbours: Neighbours) -> None:
    stage = await neighbours.stage("denoiser")
    made, whole = await checkpoints(stage, epoch=2)
    stale = await refused(stage, checkpoint=made[4], epoch=1)
    assert isinstance(stale, StaleEpoch)
    async with engine_held(stage):
        first = asyncio.create_task(failure_of(start(stage, run_id="same", step_count=STEPS, epoch=3)))
        await eventually(lambda: stage.running_count == 1)
        second = asyncio.create_task(finish(start(stage, run_id="same", step_count=STEPS, epoch=4, deterministic=True)))
        third = await refused(stage, run_id="same", epoch=4)
        ended = from_rpc_error(await first, "denoiser")
    assert isinstance(ended, StaleEpoch)
    assert isinstance(third, StaleEpoch)
    assert torch.equal(latents(await second), whole)


async def test_equal_request_ids_are_two_requests(neighbours: Neighbours) -> None:
    stage = await neighbours.stage("denoiser")
    async with engine_held(stage):
        calls = [asyncio.create_task(finish(start(stage, request_id="same"))) for _ in range(2)]
        await eventually(lambda: stage.running_count == 2)
    one, two = await asyncio.gather(*calls)
    assert latents(one).isfinite().all()
    assert latents(two).isfinite().all()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("checkpoint_interval", -1),
        ("from_step", 3),
        ("to_step", -1),
        ("epoch", -1),
        ("priority", 101),
        ("tenant", "x" * 65),
        ("run_id", "a b"),
    ],
)
async def test_fields_out_of_range_are_refused_by_name(neighbours: Neighbours, field: str, value: Any) -> None:
    stage = await neighbours.stage("denoiser")
    error = await failure_of(start(stage, **{field: value}))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert str(error.details()).startswith(field)
