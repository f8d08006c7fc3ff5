"""A base hands its latents to a refiner, through the router, as diffusers hands them over in one process."""

import asyncio
import io
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from darkroom.client import Client
from darkroom.runtime.cluster import LocalCluster
from darkroom.v1 import graph_pb2, router_pb2, router_pb2_grpc
from tests.models.oracle import NEGATIVE, SIZE_PX
from tests.tiny.variants import save_variants

pytestmark = pytest.mark.asyncio(loop_scope="session")
BASE, REFINER = "tiny-sdxl", "tiny-sdxl-refiner"
STEPS, AT_STEP = 10, 8


def graph() -> graph_pb2.Graph:
    def encode(name: str, model_id: str) -> graph_pb2.Node:
        text = graph_pb2.EncodeText(model_id=model_id, prompt="a ring", negative_prompt=NEGATIVE, guided=True)
        return graph_pb2.Node(id=name, encode_text=text)

    def denoise(name: str, model_id: str, **steps: int) -> graph_pb2.Node:
        work: dict[str, Any] = {
            "width_px": SIZE_PX,
            "height_px": SIZE_PX,
            "image_count": 1,
            "step_count": STEPS,
            **steps,
        }
        work |= {"model_id": model_id, "guidance_scale": 5.0, "scheduler": "euler", "seed": 5}
        return graph_pb2.Node(id=name, denoise=graph_pb2.Denoise(**work))

    edges = [
        ("words", "embedding", "base", "embedding"),
        ("other", "embedding", "refiner", "embedding"),
        ("base", "latent", "refiner", "latent"),
        ("refiner", "latent", "decode", "latent"),
    ]
    return graph_pb2.Graph(
        nodes=[
            encode("words", BASE),
            encode("other", REFINER),
            denoise("base", BASE, to_step=AT_STEP),
            denoise("refiner", REFINER, from_step=AT_STEP),
            graph_pb2.Node(id="decode", decode=graph_pb2.Decode(model_id=REFINER)),
        ],
        edges=[graph_pb2.Edge(from_node=a, from_port=b, to_node=c, to_port=d) for a, b, c, d in edges],
    )


async def drawn(address: str) -> np.ndarray:
    async with grpc.aio.insecure_channel(address) as channel:
        request = router_pb2.RunGraphRequest(graph=graph(), deterministic=True)
        steps: dict[str, list[int]] = {}
        async for event in router_pb2_grpc.RouterServiceStub(channel).RunGraph(request, timeout=60):
            if event.HasField("node_progress"):
                steps.setdefault(event.node_progress.node_id, []).append(event.node_progress.step)
            if event.HasField("result"):
                assert steps == {"base": list(range(1, AT_STEP + 1)), "refiner": list(range(AT_STEP + 1, STEPS + 1))}
                image = Image.open(io.BytesIO(event.result.images[0].images[0].data))
                return np.asarray(image).astype(int)
    raise AssertionError("no result")


async def test_base_and_refiner_draw_what_they_draw_in_plain_diffusers(
    cluster: LocalCluster, client: Client, store: Path
) -> None:
    save_variants(store)
    async with asyncio.timeout(30):
        while REFINER not in {model.model_id for model in (await client.catalogue()).models}:
            await asyncio.sleep(0.2)
    found = await drawn(cluster.addresses.router)
    given = {
        "prompt": "a ring", "negative_prompt": NEGATIVE, "guidance_scale": 5.0, "num_inference_steps": STEPS,
        "generator": torch.Generator().manual_seed(5),
    }  # fmt: skip
    base, refiner = (DiffusionPipeline.from_pretrained(store / name) for name in (BASE, REFINER))
    for pipeline in (base, refiner):
        pipeline.set_progress_bar_config(disable=True)
        pipeline.scheduler = type(base.scheduler).from_config(pipeline.scheduler.config)
    share = AT_STEP / STEPS
    handed = base(**given, width=SIZE_PX, height=SIZE_PX, denoising_end=share, output_type="latent").images
    expected = refiner(**given, image=handed, denoising_start=share).images[0]
    assert np.abs(found - np.asarray(expected).astype(int)).max() <= 1
