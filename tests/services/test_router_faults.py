"""The router when a replica fails, fills up, leaves or is missing, and when time runs out."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import grpc
import numpy as np
import pytest

from darkroom.errors import DeadlinePassed, Moved, QueueFull, StageUnavailable
from darkroom.runtime.processes import free_port
from darkroom.v1 import router_pb2
from darkroom.wire.tensors import RemoteTensor
from services.router.values import Embedding, Event, Finished, Images, NodeStarted
from tests.services.neighbours import Neighbours, RunningRouter, engine_held, eventually, failure_of
from tests.services.routing import (
    attempts,
    finish,
    generate,
    pixels,
    refusal,
    run,
    start_all,
    txt2img,
    within,
)


async def test_a_node_moves_on_from_a_replica_that_is_down(neighbours: Neighbours) -> None:
    await neighbours.list_dead("denoiser", "denoiser-0", f"127.0.0.1:{free_port()}")
    await start_all(neighbours)
    router = await neighbours.router()
    first, second = [await finish(generate(router)) for _ in range(2)]
    assert attempts(first) == {"encode": 1, "denoise": 2, "decode": 1}
    assert attempts(second) == {"encode": 1, "denoise": 1, "decode": 1}, "the dead one is a suspect now"


async def test_a_node_moves_on_from_a_replica_that_dies_under_it(neighbours: Neighbours) -> None:
    await start_all(neighbours)
    dying = await neighbours.stage("denoiser", 0)
    router = await neighbours.router()
    async with engine_held(dying):
        call = asyncio.create_task(finish(generate(router, deterministic=True)))
        await eventually(lambda: dying.running_count == 1)
        await dying.kill()
        moved = await call
    assert attempts(moved)["denoise"] == 2
    straight = await finish(generate(router, deterministic=True))
    assert np.array_equal(pixels(moved.images[0].data), pixels(straight.images[0].data))


async def test_a_node_moves_on_from_a_replica_that_is_full(neighbours: Neighbours) -> None:
    full = await neighbours.stage("denoiser", 0, max_running=1)
    await start_all(neighbours)
    router, other = await neighbours.router(), await neighbours.router()
    async with engine_held(full):
        waiting = asyncio.create_task(finish(generate(other)))
        await eventually(lambda: full.running_count == 1)
        result = await finish(generate(router))
        assert attempts(result)["denoise"] == 2
    assert attempts(await waiting)["denoise"] == 1


async def test_when_all_replicas_are_full_the_caller_hears_when_to_come_back(neighbours: Neighbours) -> None:
    await neighbours.stage("encoder")
    full = await neighbours.stage("denoiser", max_running=1)
    router = await neighbours.router()
    async with engine_held(full):
        waiting = generate(router)
        await eventually(lambda: full.running_count == 1)
        assert isinstance(await refusal(generate(router)), QueueFull)
        waiting.cancel()


async def test_a_request_waits_for_a_replica_to_appear(neighbours: Neighbours) -> None:
    await neighbours.stage("encoder")
    await neighbours.stage("denoiser")
    router = await neighbours.router()
    call = asyncio.create_task(finish(generate(router)))
    await asyncio.sleep(0.3)
    assert not call.done()
    await neighbours.stage("vae")
    assert attempts(await call) == {"encode": 1, "denoise": 1, "decode": 1}


async def test_a_request_waits_no_longer_than_it_may(neighbours: Neighbours) -> None:
    router = await neighbours.router(replica_wait_s=0.1)
    error = await refusal(generate(router))
    assert isinstance(error, StageUnavailable)
    assert error.facts["stage"] == "encoder"


async def test_a_replica_that_left_is_not_called(neighbours: Neighbours) -> None:
    await start_all(neighbours)
    leaving = await neighbours.stage("denoiser", 0)
    router = await neighbours.router()
    await leaving.server.drain([leaving.registration.leave])
    await eventually(lambda: len(router.view.members("denoiser")) == 1)
    assert attempts(await finish(generate(router)))["denoise"] == 1


async def test_a_draining_stage_finishes_its_request(neighbours: Neighbours) -> None:
    await start_all(neighbours)
    draining = await neighbours.stage("denoiser", 0)
    router = await neighbours.router()
    async with engine_held(draining):
        call = asyncio.create_task(finish(generate(router)))
        await eventually(lambda: draining.running_count == 1)
        drain = asyncio.create_task(draining.server.drain([draining.registration.leave]))
        await eventually(lambda: draining.server.is_draining and len(router.view.members("denoiser")) == 1)
    result = await call
    assert {timing.replica_id for timing in result.timings} >= {"denoiser-0"}
    await drain


async def test_a_draining_router_finishes_its_request_and_refuses_the_next(neighbours: Neighbours) -> None:
    await neighbours.stage("encoder")
    await neighbours.stage("vae")
    denoiser = await neighbours.stage("denoiser")
    router = await neighbours.router()
    async with engine_held(denoiser):
        call = asyncio.create_task(finish(generate(router)))
        await eventually(lambda: denoiser.running_count == 1)
        drain = asyncio.create_task(router.server.drain())
        await eventually(lambda: router.server.is_draining)
        assert (await failure_of(generate(router))).code() is grpc.StatusCode.UNAVAILABLE
    assert (await call).images
    await drain


async def test_the_routers_own_deadline_ends_the_request_and_names_the_stage(neighbours: Neighbours) -> None:
    await neighbours.stage("encoder")
    denoiser = await neighbours.stage("denoiser")
    router = await neighbours.router(default_deadline_s=0.5)
    async with engine_held(denoiser):
        error = await failure_of(generate(router, timeout_s=None))
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert error.details() == "the deadline passed at the denoiser stage"
    await eventually(lambda: denoiser.running_count == 0)


async def test_the_callers_deadline_ends_the_work_at_the_stage(neighbours: Neighbours) -> None:
    await neighbours.stage("encoder")
    denoiser = await neighbours.stage("denoiser")
    router = await neighbours.router()
    async with engine_held(denoiser):
        call = asyncio.create_task(refusal(generate(router, timeout_s=1.0)))
        await eventually(lambda: denoiser.running_count == 1)
        assert isinstance(await call, DeadlinePassed)
        await eventually(lambda: denoiser.running_count == 0)


@pytest.mark.parametrize("within_s", [0.0, -5.0])
async def test_a_deadline_that_has_passed_already_costs_no_stage_any_work(
    neighbours: Neighbours, within_s: float
) -> None:
    encoder = await neighbours.stage("encoder")
    router = await neighbours.router()
    with pytest.raises(DeadlinePassed):
        await run(router, within_s=within_s)
    assert encoder.replica.state().finished_count == 0


async def test_a_caller_that_leaves_ends_the_work_at_the_stage(neighbours: Neighbours) -> None:
    await neighbours.stage("encoder")
    denoiser = await neighbours.stage("denoiser")
    router = await neighbours.router()
    call = generate(router, step_count=900)
    async for event in call:
        if event.HasField("node_progress"):
            break
    call.cancel()
    await eventually(lambda: denoiser.running_count == 0)
    assert denoiser.forward_count < 900


async def test_a_full_router_says_when_to_come_back(neighbours: Neighbours) -> None:
    router = await neighbours.router(max_running=1)
    waiting = asyncio.create_task(refusal(generate(router, timeout_s=1.0)))
    await eventually(lambda: router.runner._request_count == 1)
    error = await refusal(generate(router))
    assert isinstance(error, QueueFull)
    assert error.facts["limit"] == "1"
    await waiting
    await eventually(lambda: router.runner._request_count == 0)


async def test_large_tensors_pass_the_router_as_refs(neighbours: Neighbours) -> None:
    encoder = await neighbours.stage("encoder", inline_limit_bytes=0)
    denoiser = await neighbours.stage("denoiser", inline_limit_bytes=0)
    await neighbours.stage("vae")
    router = await neighbours.router()
    events = await run(router)
    finished = events[-1]
    assert isinstance(finished, Finished)
    embedding, images = finished.values["encode"], finished.values["decode"]
    assert isinstance(embedding, Embedding)
    assert all(isinstance(tensor, RemoteTensor) for tensor in embedding.tensors.values())
    assert encoder.shelf.size_bytes > 0
    assert denoiser.shelf.size_bytes > 0
    by_value = await finish(generate(router, guidance_scale=5.0, deterministic=True))
    assert isinstance(images, Images)
    assert np.array_equal(pixels(images.files[0].data), pixels(by_value.images[0].data))


@pytest.mark.parametrize("has_left", [False, True], ids=["died", "left"])
async def test_an_input_whose_holder_is_gone_is_made_again(neighbours: Neighbours, *, has_left: bool) -> None:
    holder = await neighbours.stage("encoder", 1, inline_limit_bytes=0)
    router = await neighbours.router()
    events: list[Event] = []

    async def follow() -> None:
        async for event in router.runner.run(txt2img(), within(30.0)):
            events.append(event)  # noqa: PERF401 - it grows while others read it

    running = asyncio.create_task(follow())
    await eventually(lambda: holder.shelf.size_bytes > 0)
    if has_left:
        await holder.registration.leave()
    await holder.kill()
    await neighbours.stage("encoder", 2, inline_limit_bytes=0)
    await neighbours.stage("vae")
    await neighbours.stage("denoiser")
    await running
    assert isinstance(events[-1], Finished)
    assert isinstance(events[-1].values["decode"], Images)
    started = [(event.node_id, event.replica_id) for event in events if isinstance(event, NodeStarted)]
    assert started[:2] == [("encode", "encoder-1"), ("denoise", "denoiser-1")]
    assert started[-3:] == [("encode", "encoder-2"), ("denoise", "denoiser-1"), ("decode", "vae-1")]


async def test_an_input_that_its_holder_dropped_is_made_again(neighbours: Neighbours) -> None:
    encoder = await neighbours.stage("encoder", inline_limit_bytes=0)
    router = await neighbours.router()
    running = asyncio.create_task(run(router))
    await eventually(lambda: encoder.shelf.size_bytes > 0)
    encoder.shelf._held.clear()
    await neighbours.stage("vae")
    await neighbours.stage("denoiser")
    events = await running
    started = [event.node_id for event in events if isinstance(event, NodeStarted)]
    assert started == ["encode", "denoise", "encode", "denoise", "decode"]


async def test_a_request_goes_on_from_its_last_step_when_its_denoiser_dies(neighbours: Neighbours) -> None:
    await start_all(neighbours)
    dying = await neighbours.stage("denoiser", 0)
    router = await neighbours.router()
    straight = await finish(generate(router, deterministic=True, step_count=60))
    before = sum(stage.forward_count for stage in neighbours.stages("denoiser"))
    moved = await _finish_while(router, dying.kill, at_step=20)
    assert attempts(moved)["denoise"] == 2
    assert np.array_equal(pixels(moved.images[0].data), pixels(straight.images[0].data))
    repeated = sum(stage.forward_count for stage in neighbours.stages("denoiser")) - before - 60
    assert 0 <= repeated <= 3, "only what was done and not heard of yet is done again"


async def test_a_request_that_is_handed_back_goes_on_elsewhere_and_repeats_nothing(neighbours: Neighbours) -> None:
    await start_all(neighbours)
    leaving = await neighbours.stage("denoiser", 0)
    router = await neighbours.router()
    straight = await finish(generate(router, deterministic=True, step_count=60))
    before = sum(stage.forward_count for stage in neighbours.stages("denoiser"))

    async def leave() -> None:
        await leaving.registration.leave()
        leaving.replica.hand_back()

    moved = await _finish_while(router, leave, at_step=20)
    assert attempts(moved)["denoise"] == 2
    assert np.array_equal(pixels(moved.images[0].data), pixels(straight.images[0].data))
    repeated = sum(stage.forward_count for stage in neighbours.stages("denoiser")) - before - 60
    assert repeated <= 1, "at most the step that was being done"


async def test_a_request_may_come_back_to_a_replica_once_it_has_got_further(neighbours: Neighbours) -> None:
    """Two replicas hand it back in turn, as when they are restarted one after the other."""
    await start_all(neighbours)
    other = await neighbours.stage("denoiser", 0)
    router = await neighbours.router()
    stages = {"denoiser-0": other, "denoiser-1": neighbours.stages("denoiser")[0]}
    started: list[str] = []
    steps: list[int] = []
    handing_back_count = 0
    async for event in generate(router, step_count=60, deterministic=True, timeout_s=60.0):
        if event.HasField("node_started") and event.node_started.node_id == "denoise":
            for left in started[-1:]:
                stages[left].replica._executor._handed_back_with = None  # it handed back, and is up again
            started.append(event.node_started.replica_id)
        if event.HasField("node_progress"):
            steps.append(event.node_progress.step)
            if handing_back_count < min(len(started), 3):
                stages[started[-1]].replica.hand_back()
                handing_back_count += 1
    assert event.result.images
    assert started in (["denoiser-0", "denoiser-1"] * 2, ["denoiser-1", "denoiser-0"] * 2)
    assert steps == list(range(1, 61)), "every step is told once"


async def test_a_request_that_every_replica_hands_back_is_given_up(neighbours: Neighbours) -> None:
    """What a replica gives back untouched is no progress, so nobody is asked twice for it."""
    await start_all(neighbours)
    await neighbours.stage("denoiser", 0)
    router = await neighbours.router(replica_wait_s=0.1)
    started: list[str] = []

    async def follow() -> AsyncIterator[router_pb2.GenerateResponse]:
        async for event in generate(router, step_count=300):
            if event.HasField("node_started") and event.node_started.node_id == "denoise":
                started.append(event.node_started.replica_id)
            if event.HasField("node_progress") and event.node_progress.step == 1:
                for stage in neighbours.stages("denoiser"):
                    stage.replica.hand_back()
            yield event

    assert isinstance(await refusal(follow()), Moved)
    first, second = sorted(set(started), key=started.index)
    assert started == [first, second, first], "the first one again, for it had got further"


async def test_a_replica_that_falls_silent_is_left(neighbours: Neighbours) -> None:
    await start_all(neighbours)
    router = await neighbours.router()
    await neighbours.list_silent("denoiser", "denoiser-0")
    start_s = asyncio.get_running_loop().time()
    result = await finish(generate(router))
    assert attempts(result)["denoise"] == 2
    assert asyncio.get_running_loop().time() - start_s < 5


async def _finish_while(
    router: RunningRouter, happens: Callable[[], Awaitable[None]], *, at_step: int
) -> router_pb2.GenerateResult:
    """Draws 60 steps; at one of them something happens."""
    result = router_pb2.GenerateResult()
    async for event in generate(router, deterministic=True, step_count=60, timeout_s=60.0):
        if event.HasField("node_progress") and event.node_progress.step == at_step:
            await happens()
        if event.HasField("result"):
            result = event.result
    return result
