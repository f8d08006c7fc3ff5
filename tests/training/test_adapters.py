"""LoRAs and the ControlNet: twenty steps lower the loss, and plain diffusers loads what is saved."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

from tests.training.tiny import PLAN, falls, latents, tiny_shapes
from training.controlnet import ControlNetTraining, draw_anywhere, edges, follow, followed, make_guided, some_anywhere
from training.dit import assemble as dit
from training.dit import make_transformer
from training.evaluate import easy_scenes
from training.lora import LoraTraining
from training.saving import save_network
from training.scenes import BACKGROUNDS, SIZE_PX, STYLES, draw_all, random_scenes
from training.styles import is_visible, share_in_style, style_of
from training.text import make_t5_encoder
from training.tokenizer import make_t5_tokenizer

DIT = {"height": SIZE_PX, "width": SIZE_PX, "max_sequence_length": 32}


@pytest.mark.parametrize("kind", ["unet", "transformer"])
def test_a_lora_learns_and_diffusers_loads_it(kind: str, tmp_path: Path) -> None:
    shapes = tiny_shapes()
    pipe, options = shapes, {}
    if kind == "transformer":
        pipe, options = dit(shapes, make_t5_encoder(make_t5_tokenizer()).eval(), make_transformer()), DIT
    lora = LoraTraining(pipe, "outline", latents(), PLAN)
    assert falls(lora.run(batch=8))
    lora.save(tmp_path, base="shapes")
    draw = {"num_inference_steps": 2, "output_type": "np", **options}
    before = pipe("a red circle", generator=torch.Generator().manual_seed(0), **draw).images
    pipe.load_lora_weights(tmp_path, adapter_name="style")
    after = pipe("a red circle", generator=torch.Generator().manual_seed(0), **draw).images
    assert np.abs(after - before).max() > 1e-3


def test_the_controlnet_learns_and_diffusers_loads_it(tmp_path: Path) -> None:
    pipe = tiny_shapes()
    training = ControlNetTraining(pipe, make_guided(pipe, 16, seed=1), PLAN)
    assert falls(training.run(batch=8))
    save_network(training.averaged, tmp_path, base="shapes")
    parts = {**pipe.components, "controlnet": ControlNetModel.from_pretrained(tmp_path)}
    steered = StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False)
    pictures = follow(steered, some_anywhere(2), steps=2, guidance=2.0)
    assert pictures.shape == (2, SIZE_PX, SIZE_PX, 3)


def test_drawings_themselves_are_where_their_edges_are_and_not_where_others_are() -> None:
    drawings = some_anywhere(30)
    share = followed(np.stack([drawing.picture for drawing in drawings]), drawings)
    assert (share.share, share.by_chance) == (1.0, 0.0)


def test_a_thing_anywhere_stays_inside_and_its_edges_run_along_it() -> None:
    rng = random.Random(3)
    for _ in range(50):
        masks = draw_anywhere(rng).masks
        assert masks[0].any()
        assert not np.concatenate([masks[0][[0, -1]], masks[0][:, [0, -1]].T]).any()
        lines = edges(masks)[..., 0] > 127
        assert 40 < lines.sum() < (masks[0] > 127).sum()
        assert (masks[0] > 0)[lines].all()


def test_each_style_paints_the_same_scenes_differently() -> None:
    scenes = random_scenes(4, seed=2)
    pictures = [draw_all(scenes, 1, style) for style in STYLES]
    for i, first in enumerate(pictures):
        for second in pictures[i + 1 :]:
            assert all((a != b).any() for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("style", STYLES)
def test_the_style_of_drawn_truth_is_told(style: str) -> None:
    scenes = easy_scenes(100, seed=9)
    assert share_in_style(draw_all(scenes, 1, style), scenes, style) >= 0.98


def test_a_picture_without_its_thing_has_no_style() -> None:
    scene = easy_scenes(1)[0]
    assert style_of(np.full((SIZE_PX, SIZE_PX, 3), BACKGROUNDS[scene.background], np.uint8), scene) is None


def test_every_style_shows_on_every_scene_but_a_shadow_on_black() -> None:
    for scene in easy_scenes(60):
        for style in STYLES[1:]:
            assert is_visible(scene, style) == ((style, scene.background) != ("shadow", "black"))
