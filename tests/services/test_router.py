"""The router over gRPC, before real stages: what it draws, where, and what it refuses."""

import asyncio
from contextlib import AsyncExitStack
from typing import Any

import numpy as np
import pytest

from darkroom.errors import InvalidGraph, ModelNotFound
from darkroom.v1 import graph_pb2, router_pb2, stage_pb2
from tests.services.neighbours import MODEL, SIZE_PX, Neighbours, engine_held, eventually
from tests.services.routing import PROMPT, attempts, finish, generate, pixels, refusal, start_all


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
