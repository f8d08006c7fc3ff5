"""Calls to a router, for its tests."""

import asyncio
import io
from typing import Any

import numpy as np
from PIL import Image

from darkroom.errors import DarkroomError
from darkroom.v1 import router_pb2
from darkroom.wire.graphs import DecodeWork, DenoiseWork, EncodeTextWork, Graph, make_graph
from darkroom.wire.status import from_rpc_error
from services.router.calls import CallSettings
from services.router.values import Event
from tests.services.neighbours import MODEL, SIZE_PX, Neighbours, RunningRouter, failure_of

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
