"""The VAE over gRPC: image files that say what they were made from, and refusals."""

import asyncio
import io
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from PIL import Image

from darkroom.models.tensors import to_raw
from darkroom.v1 import tensor_pb2, vae_pb2, vae_pb2_grpc
from darkroom.wire.tensors import value_message
from tests.services.neighbours import (
    MODEL,
    SIZE_PX,
    Neighbours,
    RunningStage,
    engine_held,
    eventually,
    failure_of,
)

LATENTS = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
NOT_FINITE = LATENTS[:1].clone().index_fill_(3, torch.tensor([5]), torch.inf)


def message(latents: torch.Tensor) -> tensor_pb2.Tensor:
    return value_message(to_raw(latents))


ONE = message(LATENTS[:1])


def decode_request(latents: tensor_pb2.Tensor = ONE, **changes: Any) -> vae_pb2.DecodeRequest:
    good = {
        "model_id": MODEL, "latents": latents, "width_px": SIZE_PX, "height_px": SIZE_PX,
        "format": vae_pb2.IMAGE_FORMAT_PNG,
    }  # fmt: skip
    return vae_pb2.DecodeRequest(**{**good, **changes})


def decode(stage: RunningStage, request: vae_pb2.DecodeRequest) -> Any:
    return vae_pb2_grpc.VaeServiceStub(stage.channel).Decode(request, timeout=20.0)


def opened(image: vae_pb2.Image) -> Image.Image:
    assert image.format == vae_pb2.IMAGE_FORMAT_PNG
    return Image.open(io.BytesIO(image.data))


async def test_each_row_becomes_a_picture_of_its_own(neighbours: Neighbours) -> None:
    vae = await neighbours.stage("vae")
    together = [np.asarray(opened(image)) for image in (await decode(vae, decode_request(message(LATENTS)))).images]
    assert [picture.shape for picture in together] == [(SIZE_PX, SIZE_PX, 3)] * 3
    for row, picture in enumerate(together):
        (alone,) = (await decode(vae, decode_request(message(LATENTS[row : row + 1])))).images
        assert (alone.width_px, alone.height_px) == (SIZE_PX, SIZE_PX)
        assert np.abs(np.asarray(opened(alone)).astype(int) - picture.astype(int)).max() <= 1
    assert not np.array_equal(together[0], together[1])


async def test_requests_that_wait_together_share_a_batch_unless_deterministic(neighbours: Neighbours) -> None:
    vae = await neighbours.stage("vae")
    await decode(vae, decode_request())
    forwards, batches = vae.forward_count, vae.batch_count
    async with engine_held(vae):
        shared = [asyncio.ensure_future(decode(vae, decode_request(message(LATENTS[i : i + 1])))) for i in range(3)]
        alone = asyncio.ensure_future(decode(vae, decode_request(deterministic=True)))
        await eventually(lambda: vae.running_count == 4)
        await asyncio.sleep(0.3)  # accepted; a moment later all four wait for the engine
    pictures = [opened((await answer).images[0]) for answer in (*shared, alone)]
    assert len({picture.tobytes() for picture in pictures[:3]}) == 3
    assert vae.forward_count - forwards == 4
    assert vae.batch_count - batches == 2


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"prompt": "a red ring", "seed": "7"},
        {"prompt": "größer, ёлка, 輪, 🜁", "negative_prompt": ""},
        {"prompt": "%s{{7*7}}<b>\r\nx\n"},
        {"k" * 79: "v" * 64_000, "ä": "é"},
    ],
)
async def test_the_file_has_the_parameters_as_text_chunks(neighbours: Neighbours, parameters: dict[str, str]) -> None:
    vae = await neighbours.stage("vae")
    answer = await decode(vae, decode_request(message(LATENTS[:2]), parameters=parameters))
    assert [getattr(opened(image), "text") for image in answer.images] == [parameters] * 2  # noqa: B009 - Pillow's stubs lack it


BAD_LATENTS = {
    "NaN": (message(LATENTS[:1] * torch.nan), "not finite"),
    "one infinity": (message(NOT_FINITE), "not finite"),
    "another size": (message(LATENTS[:1, :, :8]), "has shape [1, 4, 8, 16]"),
    "another channel count": (message(LATENTS[:1, :3]), "has shape"),
    "no row dimension": (message(LATENTS[0]), "has shape"),
    "no dimension": (message(LATENTS.sum()), "has shape []"),
    "whole numbers": (message(LATENTS[:1].int()), "floating point"),
    "more rows than a request has images": (message(LATENTS[:1].repeat(11, 1, 1, 1)), "at most 10"),
    "missing": (tensor_pb2.Tensor(), "unknown element type"),
    "short": (
        tensor_pb2.Tensor(element_type=tensor_pb2.ELEMENT_TYPE_FLOAT32, shape=[1, 4, 16, 16], data=b"x"),
        "1 bytes",
    ),
}


@pytest.mark.parametrize("case", BAD_LATENTS)
async def test_bad_latents_are_refused_by_name(neighbours: Neighbours, case: str) -> None:
    latents, problem = BAD_LATENTS[case]
    vae = await neighbours.stage("vae")
    error = await failure_of(decode(vae, decode_request(latents)))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert str(error.details()).startswith("tensor latents ")
    assert problem in str(error.details())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
async def test_latents_of_another_precision_are_taken(neighbours: Neighbours, dtype: torch.dtype) -> None:
    vae = await neighbours.stage("vae")
    (image,) = (await decode(vae, decode_request(message(LATENTS[:1].to(dtype))))).images
    (own,) = (await decode(vae, decode_request())).images
    assert np.abs(np.asarray(opened(image)).astype(int) - np.asarray(opened(own)).astype(int)).mean() < 4


@pytest.mark.parametrize(("field", "value"), [("width_px", 33), ("height_px", 31), ("format", 0), ("model_id", "a/b")])
async def test_a_wrong_field_is_refused_by_name(neighbours: Neighbours, field: str, value: Any) -> None:
    vae = await neighbours.stage("vae")
    error = await failure_of(decode(vae, decode_request(**{field: value})))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert field in str(error.details())
