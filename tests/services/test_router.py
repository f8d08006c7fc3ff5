"""The router over gRPC, before real stages: where it places nodes, and what it does when a replica fails."""

import asyncio
import io
from contextlib import AsyncExitStack
from typing import Any

import grpc
import numpy as np
import pytest
from PIL import Image

from darkroom.errors import DarkroomError, DeadlinePassed, InvalidGraph, ModelNotFound, QueueFull, StageUnavailable
from darkroom.runtime.processes import free_port
from darkroom.v1 import graph_pb2, router_pb2, stage_pb2
from darkroom.wire.graphs import DecodeWork, DenoiseWork, EncodeTextWork, Graph, make_graph
from darkroom.wire.status import from_rpc_error
from darkroom.wire.tensors import RemoteTensor
from services.router.running import CallSettings
from services.router.values import Embedding, Event, Finished, Images, NodeStarted
from tests.services.neighbours import MODEL, SIZE_PX, Neighbours, RunningRouter, engine_held, eventually, failure_of

PROMPT = "a red ring"


def generate_request(**changes: Any) -> router_pb2.GenerateRequest:
    return router_pb2.GenerateRequest(**{"prompt": PROMPT, "step_count": 3, "seed": 7, **changes})


def generate(router: RunningRouter, *, timeout_s: float | None = 30.0, **changes: Any) -> Any:
    return router.stub.Generate(generate_request(**changes), timeout=timeout_s)


async def finish(call: Any) -> router_pb2.GenerateResult:
    events = [event async for event in call]
    result: router_pb2.GenerateResult = events[-1].result
    return result


async def refusal(call: Any) -> DarkroomError:
    error = from_rpc_error(await failure_of(call), "router")
    assert error is not None
    return error


def attempts(result: router_pb2.GenerateResult) -> dict[str, int]:
    return {timing.node_id: timing.attempt_count for timing in result.timings}


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def txt2img(step_count: int = 3) -> Graph:
    denoise = DenoiseWork(
        model_id=MODEL,
        width_px=SIZE_PX,
        height_px=SIZE_PX,
        step_count=step_count,
        guidance_scale=5.0,
        seed=7,
        image_count=1,
        scheduler="",
    )
    return make_graph(
        {
            "encode": (EncodeTextWork(model_id=MODEL, prompt=PROMPT, negative_prompt="", guided=True), {}),
            "denoise": (denoise, {"embedding": "encode"}),
            "decode": (DecodeWork(model_id=MODEL), {"latent": "denoise"}),
        }
    )


def within(seconds: float) -> CallSettings:
    deadline_s = asyncio.get_running_loop().time() + seconds
    return CallSettings(request_id="r", deterministic=True, deadline_s=deadline_s)


async def run(router: RunningRouter, *, within_s: float = 30.0) -> list[Event]:
    return [event async for event in router.runner.run(txt2img(), within(within_s))]


async def start_all(neighbours: Neighbours) -> None:
    for stage in ("encoder", "denoiser", "vae"):
        await neighbours.stage(stage)


async def test_a_picture_is_drawn_stage_by_stage(neighbours: Neighbours) -> None:
    await start_all(neighbours)
    router = await neighbours.router()
    events = [event async for event in generate(router)]
    assert [event.WhichOneof("event") for event in events] == [
        "node_started", "node_started", *["node_progress"] * 3, "node_started", "result",
    ]  # fmt: skip
    assert [e.node_started.replica_id for e in events if e.HasField("node_started")] == [
        "encoder-1", "denoiser-1", "vae-1",
    ]  # fmt: skip
    result = events[-1].result
    assert pixels(result.images[0].data).shape == (SIZE_PX, SIZE_PX, 3)
    assert [timing.stage for timing in result.timings] == [
        stage_pb2.STAGE_ENCODER, stage_pb2.STAGE_DENOISER, stage_pb2.STAGE_VAE,
    ]  # fmt: skip
    assert attempts(result) == {"encode": 1, "denoise": 1, "decode": 1}


async def test_without_a_seed_one_is_picked_and_told(neighbours: Neighbours) -> None:
    await start_all(neighbours)
    router = await neighbours.router()
    request = router_pb2.GenerateRequest(prompt=PROMPT, step_count=1)
    first, second = [await finish(router.stub.Generate(request, timeout=30.0)) for _ in range(2)]
    assert first.seed != second.seed
    again = await finish(generate(router, step_count=1, seed=first.seed))
    assert again.seed == first.seed
    assert np.abs(pixels(again.images[0].data).astype(int) - pixels(first.images[0].data).astype(int)).max() <= 1


async def test_a_graph_written_by_hand_draws_what_generate_draws(neighbours: Neighbours) -> None:
    await start_all(neighbours)
    router = await neighbours.router()
    generated = await finish(generate(router, guidance_scale=5.0, deterministic=True))
    graph = graph_pb2.Graph(
        nodes=[
            graph_pb2.Node(id="out", decode=graph_pb2.Decode(model_id=MODEL)),
            graph_pb2.Node(
                id="draw",
                denoise=graph_pb2.Denoise(
                    model_id=MODEL,
                    width_px=SIZE_PX,
                    height_px=SIZE_PX,
                    step_count=3,
                    guidance_scale=5.0,
                    seed=7,
                    image_count=1,
                ),
            ),
            graph_pb2.Node(id="text", encode_text=graph_pb2.EncodeText(model_id=MODEL, prompt=PROMPT, guided=True)),
        ],
        edges=[
            graph_pb2.Edge(from_node="draw", from_port="latent", to_node="out", to_port="latent"),
            graph_pb2.Edge(from_node="text", from_port="embedding", to_node="draw", to_port="embedding"),
        ],
    )
    request = router_pb2.RunGraphRequest(graph=graph, deterministic=True)
    events = [event async for event in router.stub.RunGraph(request, timeout=30.0)]
    (drawn,) = events[-1].result.images
    assert drawn.node_id == "out"
    assert np.array_equal(pixels(drawn.images[0].data), pixels(generated.images[0].data))


async def test_requests_go_to_the_replica_with_the_least_to_do(neighbours: Neighbours) -> None:
    await neighbours.stage("encoder")
    await neighbours.stage("vae")
    replicas = [await neighbours.stage("denoiser", number) for number in range(3)]
    router = await neighbours.router()
    async with AsyncExitStack() as holding:
        for replica in replicas:
            await holding.enter_async_context(engine_held(replica))
        calls = [asyncio.create_task(finish(generate(router, step_count=1))) for _ in range(6)]
        await eventually(lambda: [replica.running_count for replica in replicas] == [2, 2, 2])
    assert all(result.images for result in await asyncio.gather(*calls))


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


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"width_px": 33}, "width_px"), ({"height_px": 4096}, "height_px"), ({"scheduler": "flow_euler"}, "scheduler"),
        ({"step_count": 0}, "step_count"), ({"image_count": 0}, "image_count"), ({"seed": -2}, "seed"),
        ({"guidance_scale": -1.0}, "guidance_scale"), ({"prompt": ""}, "prompt"), ({"model_id": "../x"}, "model_id"),
        ({"request_id": "a b"}, "request_id"),
    ],
)  # fmt: skip
async def test_a_wrong_field_is_refused_before_any_stage_is_asked(
    neighbours: Neighbours, changes: dict[str, Any], field: str
) -> None:
    router = await neighbours.router()
    error = await refusal(generate(router, **changes))
    assert error.facts["field"] == field


async def test_an_unknown_model_is_not_found(neighbours: Neighbours) -> None:
    router = await neighbours.router()
    assert isinstance(await refusal(generate(router, model_id="nowhere")), ModelNotFound)


@pytest.mark.parametrize(
    ("changes", "problem"), [({"width_px": 33}, "width_px"), ({"scheduler": "flow_euler"}, "scheduler")]
)
async def test_what_a_graph_asks_of_a_model_is_checked_by_node(
    neighbours: Neighbours, changes: dict[str, Any], problem: str
) -> None:
    router = await neighbours.router()
    denoise = {"model_id": MODEL, "width_px": SIZE_PX, "height_px": SIZE_PX, "step_count": 3, "image_count": 1}
    nodes = [
        graph_pb2.Node(id="text", encode_text=graph_pb2.EncodeText(model_id=MODEL, prompt=PROMPT)),
        graph_pb2.Node(id="draw", denoise=graph_pb2.Denoise(**{**denoise, **changes})),
    ]
    edges = [graph_pb2.Edge(from_node="text", from_port="embedding", to_node="draw", to_port="embedding")]
    request = router_pb2.RunGraphRequest(graph=graph_pb2.Graph(nodes=nodes, edges=edges))
    error = await refusal(router.stub.RunGraph(request, timeout=30.0))
    assert isinstance(error, InvalidGraph)
    assert error.facts["node"] == "draw"
    assert problem in error.message
