"""Everything in `models`, through real services: the picture that plain diffusers draws from the same folder."""

import io
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, DiffusionPipeline, StableDiffusionControlNetPipeline
from PIL import Image

from darkroom.client import Client, Drawing
from darkroom.registry.catalogue import GuideEntry, LoraEntry, read_model_store
from darkroom.wire.conditions import ConditionFiles, ControlUse
from tests.shipped import MODELS, sampled
from training.controlnet import draw_anywhere, edges
from training.evaluate import load, model_defaults
from training.scenes import SIZE_PX
from training.tokenizer import MAX_TOKENS

pytestmark = pytest.mark.asyncio(loop_scope="session")
SHIPPED = read_model_store(MODELS)
HARD = "a red circle left of a blue star on a beige background"


def plainly(pipe: DiffusionPipeline, model_id: str, seed: int, **more: object) -> np.ndarray:
    """A picture at the model's own settings."""
    settings = model_defaults(MODELS / model_id)
    if "max_sequence_length" in (MODELS / model_id / "darkroom.json").read_text():
        more |= {"height": SIZE_PX, "width": SIZE_PX, "max_sequence_length": MAX_TOKENS}
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode():
        answer = pipe(
            HARD,
            num_inference_steps=settings["steps"],
            guidance_scale=settings["guidance"],
            generator=generator,
            **more,
        )
    return np.asarray(answer.images[0]).astype(int)


def pixels(file: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB")).astype(int)


@pytest.mark.parametrize("model_id", [entry.model_id for entry in SHIPPED.models])
async def test_a_shipped_model_draws_as_in_plain_diffusers(client: Client, model_id: str) -> None:
    drawn = await client.draw(Drawing(prompt=HARD, model_id=model_id, seed=5, deterministic=True))
    torch.set_num_threads(1)
    assert np.array_equal(pixels(drawn.images[0]), plainly(load(MODELS / model_id), model_id, 5))


@pytest.mark.parametrize("entry", sampled(SHIPPED.loras))
async def test_a_shipped_lora_draws_as_in_plain_diffusers(client: Client, entry: LoraEntry) -> None:
    base_id = str(entry.base_model)
    drawing = Drawing(prompt=HARD, model_id=base_id, seed=6, deterministic=True)
    pipe = load(MODELS / base_id)
    pipe.load_lora_weights(MODELS / entry.lora_id)
    styled = await client.draw(replace(drawing, loras=((entry.lora_id, None),)))
    assert np.abs(pixels(styled.images[0]) - plainly(pipe, base_id, 6)).max() <= 1
    plain = await client.draw(drawing)
    assert np.abs(pixels(styled.images[0]) - pixels(plain.images[0])).max() > 50


@pytest.mark.parametrize("entry", SHIPPED.guides, ids=lambda entry: entry.guide_id)
async def test_the_shipped_controlnet_draws_as_in_plain_diffusers(client: Client, entry: GuideEntry) -> None:
    base_id = str(entry.base_model)
    lines = Image.fromarray(edges(draw_anywhere(random.Random(4)).masks))
    file = io.BytesIO()
    lines.save(file, format="PNG")
    use = ControlUse(controlnet_id=entry.guide_id, image=file.getvalue(), scale=1.0, start=0.0, end=1.0)
    drawing = Drawing(prompt=HARD, model_id=base_id, seed=7, deterministic=True)
    drawn = await client.draw(replace(drawing, conditions=ConditionFiles(controls=(use,))))
    parts = {
        **load(MODELS / base_id).components,
        "controlnet": ControlNetModel.from_pretrained(MODELS / entry.guide_id),
    }
    pipe = StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False)
    assert np.abs(pixels(drawn.images[0]) - plainly(pipe, base_id, 7, image=lines)).max() <= 1
