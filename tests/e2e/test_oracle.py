"""The oracle: what comes out of the services is what plain diffusers draws in one process."""

import asyncio
import io
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from darkroom.client import Client, Drawing
from darkroom.models.loader import load_part
from darkroom.schedulers import scheduler_choice
from tests.models.oracle import CPU, NEGATIVE, SIZE_PX, Plain, Wanted
from tests.tiny_models import TINY_MODELS

pytestmark = pytest.mark.asyncio(loop_scope="session")
PROMPTS = (
    "a large red circle in the center on a white background",
    "a small blue star at the left on a black background",
    "a large green cross at the top on a beige background",
)
SCHEDULERS = ("ddim", "euler_a", "dpmpp_2m", "unipc")


@pytest.fixture(scope="module")
def plain(store: Path) -> StableDiffusionPipeline:
    torch.set_num_threads(1)
    pipeline = StableDiffusionPipeline.from_pretrained(store / "shapes", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw_plainly(plain: StableDiffusionPipeline, drawing: Drawing) -> np.ndarray:
    own = plain.scheduler
    try:
        choice = scheduler_choice(drawing.scheduler)
        plain.scheduler = getattr(diffusers, choice.class_name).from_config(own.config, **dict(choice.options))
        assert drawing.seed is not None
        generator = torch.Generator().manual_seed(drawing.seed)
        picture = plain(
            drawing.prompt,
            negative_prompt=drawing.negative_prompt or None,
            num_inference_steps=drawing.step_count,
            guidance_scale=drawing.guidance_scale,
            generator=generator,
        ).images[0]
    finally:
        plain.scheduler = own
    return np.asarray(picture)


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("prompt", PROMPTS)
async def test_a_deterministic_picture_equals_plain_diffusers_pixel_for_pixel(
    client: Client, plain: StableDiffusionPipeline, prompt: str, scheduler: str
) -> None:
    drawing = Drawing(
        prompt=prompt,
        model_id="shapes",
        scheduler=scheduler,
        step_count=12,
        guidance_scale=4.0,
        seed=len(prompt),
        negative_prompt="a small cross" if scheduler == "ddim" else "",
        deterministic=True,
    )
    drawn = await client.draw(drawing)
    assert drawn.batched_forward_count == 0
    assert np.array_equal(pixels(drawn.images[0]), draw_plainly(plain, drawing))


async def test_eight_pictures_batched_together_differ_by_rounding_only(
    client: Client, plain: StableDiffusionPipeline
) -> None:
    drawings = [
        Drawing(
            prompt=PROMPTS[i % 3],
            model_id="shapes",
            scheduler=SCHEDULERS[i % 4],
            step_count=16 + i,
            guidance_scale=3.0 + i % 3,
            seed=i,
        )
        for i in range(8)
    ]
    before = await denoiser_counts(client)
    drawn = await asyncio.gather(*(client.draw(drawing) for drawing in drawings))
    after = await denoiser_counts(client)
    requests_per_forward = (after[1] - before[1]) / (after[0] - before[0])
    print(f"mean number of requests per UNet forward: {requests_per_forward:.2f}")  # noqa: T201 - a figure to report
    assert requests_per_forward > 2
    for drawing, answer in zip(drawings, drawn, strict=True):
        difference = np.abs(pixels(answer.images[0]).astype(int) - draw_plainly(plain, drawing).astype(int))
        assert difference.max() <= 1
        assert answer.batched_forward_count > 0


async def denoiser_counts(client: Client) -> tuple[int, int]:
    states = [r.state for r in await client.replicas() if r.state and r.listed.replica_id.startswith("denoiser")]
    return sum(s.batch_count for s in states), sum(s.forward_count for s in states)


@pytest.mark.parametrize("model_id", TINY_MODELS)
async def test_every_family_goes_through_the_services_and_matches_plain_diffusers(
    client: Client, store: Path, model_id: str
) -> None:
    wanted = Wanted("a ring", seed=11, steps=5, guidance=3.5)
    drawing = Drawing(
        prompt=wanted.prompt,
        negative_prompt=NEGATIVE,
        model_id=model_id,
        width_px=SIZE_PX,
        height_px=SIZE_PX,
        step_count=wanted.steps,
        guidance_scale=wanted.guidance,
        seed=wanted.seed,
        deterministic=True,
    )
    drawn = await client.draw(drawing)
    frames = Plain(store, model_id, load_part(store, model_id, "denoiser", CPU)).frames(wanted)
    assert len(drawn.images) == len(frames)
    for image, frame in zip(drawn.images, frames, strict=True):
        assert np.abs(pixels(image).astype(int) - np.asarray(frame).astype(int)).max() <= 1


async def test_the_file_says_what_it_was_made_from(client: Client) -> None:
    drawn = await client.draw(
        Drawing(prompt="a red ring, größer", model_id="shapes", seed=5, step_count=4, image_count=2)
    )
    texts = [Image.open(io.BytesIO(png)).info for png in drawn.images]
    assert len(texts) == 2
    assert texts[0]["prompt"] == "a red ring, größer"
    assert (texts[0]["seed"], texts[0]["steps"], texts[0]["model"], texts[0]["size"]) == ("5", "4", "shapes", "128x128")


async def test_image_i_of_several_is_the_picture_of_seed_plus_i(client: Client) -> None:
    together = await client.draw(Drawing(prompt=PROMPTS[0], model_id="shapes", seed=7, step_count=6, image_count=3))
    alone = await client.draw(Drawing(prompt=PROMPTS[0], model_id="shapes", seed=9, step_count=6))
    difference = np.abs(pixels(together.images[2]).astype(int) - pixels(alone.images[0]).astype(int))
    assert difference.max() <= 1


async def test_a_stage_process_holds_only_its_own_networks(client: Client) -> None:
    await client.draw(Drawing(prompt=PROMPTS[0], model_id="shapes", step_count=2))
    expected = {"encoder": {"text_encoder"}, "denoiser": {"unet"}, "vae": {"vae"}}
    seen = {}
    for report in await client.replicas():
        assert report.state is not None
        model = next(m for m in report.state.models if m.model_id == "shapes")
        seen[report.listed.replica_id.split("-")[0]] = {
            n.name for n in model.networks if n.resident_bytes or n.parameter_count
        }
    assert seen == expected
