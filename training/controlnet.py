"""Trains a ControlNet (Zhang et al. 2023, arXiv 2302.05543) for `shapes`: a picture of edges says where a thing goes.

`shapes` knows five places; its ControlNet is shown things anywhere, with captions that name no place. Edges are white
lines on black, as any edge detector makes them.

    python -m training.controlnet --model models/shapes --out models/shapes-edges
"""

import argparse
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, StableDiffusionPipeline
from PIL import Image, ImageFilter

from training.denoiser import velocity_loss
from training.descent import Descent, Plan
from training.evaluate import load
from training.judge import Form, find
from training.saving import save_network
from training.scenes import SIZE_PX, SIZES, Drawing, Scene, draw, random_single
from training.text import embed
from training.vae import encode_all

_LINE_PX = 3  # of an edge; odd
_MARGIN_PX = 3
_UNGUIDED_SHARE = 0.1
_TOLERANCE_PX = 4.0  # half of what one latent pixel covers
_TEST_SEED = 21_000


def edges(masks: np.ndarray) -> np.ndarray:
    """White lines along the rims of what `masks` [2, H, W] uint8 cover: [H, W, 3] uint8."""
    cover = Image.fromarray(masks.max(0))
    inside = cover.filter(ImageFilter.MinFilter(_LINE_PX))
    line = np.asarray(cover) - np.minimum(np.asarray(inside), np.asarray(cover))
    return np.repeat(line[..., None], 3, axis=2)


def draw_anywhere(rng: random.Random) -> Drawing:
    """A single thing anywhere in the picture."""
    scene = random_single(rng)
    reach = 1.2 * SIZES[scene.things[0].size or "large"] + _MARGIN_PX
    x, y = (rng.uniform(reach, SIZE_PX - reach) for _ in range(2))
    return draw(scene, rng, centre=(x, y))


def placeless_caption(scene: Scene) -> str:
    """Colour, shape and background: size and place are for the edges to say."""
    (thing,) = scene.things
    return f"a {thing.colour} {thing.shape} on a {scene.background} background"


@dataclass(frozen=True, slots=True)
class Guided:
    """What a ControlNet learns from, in one order."""

    scenes: list[Scene]
    latents: torch.Tensor
    """[N, 4, 16, 16], scaled to unit deviation."""
    edges: torch.Tensor
    """[N, H, W, 3] uint8."""


def make_guided(pipe: StableDiffusionPipeline, count: int, seed: int) -> Guided:
    """Draws and encodes `count` scenes of a thing anywhere."""
    rng = random.Random(seed)
    drawn = [draw_anywhere(rng) for _ in range(count)]
    pictures = torch.from_numpy(np.stack([d.picture for d in drawn]))
    latents = encode_all(pipe.vae, pictures) * pipe.vae.config.scaling_factor
    return Guided([d.scene for d in drawn], latents, torch.from_numpy(np.stack([edges(d.masks) for d in drawn])))


def make_controlnet(pipe: StableDiffusionPipeline) -> ControlNetModel:
    """An untrained ControlNet: the UNet's own way down, and a small network that reads the picture."""
    return ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(8, 16, 32, 32))


class ControlNetTraining:
    """A ControlNet in training, beside the frozen pipeline that it steers."""

    def __init__(self, pipe: StableDiffusionPipeline, data: Guided, plan: Plan, *, folder: Path | None = None) -> None:
        torch.manual_seed(11)
        self._pipe, self._data = pipe, data
        self._controlnet = make_controlnet(pipe).train().to(memory_format=torch.channels_last)
        pipe.unet.requires_grad_(requires_grad=False)
        self.descent = Descent("controlnet", {"controlnet": self._controlnet}, plan, seed=11, folder=folder)

    @property
    def averaged(self) -> ControlNetModel:
        """The average of the ControlNet: what is shipped."""
        return self.descent.averaged("controlnet")

    def loss(self, batch: int) -> torch.Tensor:
        """The UNet's own error, steered by the edges."""
        rng = self.descent.rng
        rows = [rng.randrange(len(self._data.scenes)) for _ in range(batch)]
        scenes = [self._data.scenes[row] for row in rows]
        texts = ["" if rng.random() < _UNGUIDED_SHARE else placeless_caption(scene) for scene in scenes]
        embedding_BTD = embed(self._pipe.tokenizer, self._pipe.text_encoder, texts)
        edges_BCHW = self._data.edges[rows].permute(0, 3, 1, 2).float() / 255

        def steer(noisy_BCHW: torch.Tensor, timestep_B: torch.Tensor) -> dict[str, Any]:
            down, middle = self._controlnet(
                noisy_BCHW, timestep_B, embedding_BTD, controlnet_cond=edges_BCHW, return_dict=False
            )
            return {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}

        return velocity_loss(self._pipe.unet, self._data.latents[rows], embedding_BTD, steer)

    def run(self, *, batch: int = 32) -> list[float]:
        """Trains until the plan ends. Returns the loss of each step."""
        return self.descent.run(lambda: self.loss(batch))


@dataclass(frozen=True, slots=True)
class Followed:
    """How often a thing is of the shape asked for, and where it should be."""

    share: float
    by_chance: float
    """The share that would be right if each were asked for what the next one was."""


@torch.no_grad()
def follow(
    pipe: StableDiffusionControlNetPipeline, drawings: Sequence[Drawing], *, steps: int, guidance: float
) -> np.ndarray:
    """Draws a thing along the edges of each drawing's: [N, H, W, 3] uint8."""
    answers = [
        pipe(
            placeless_caption(drawing.scene),
            image=Image.fromarray(edges(drawing.masks)),
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=torch.Generator().manual_seed(seed),
            output_type="np",
        )
        for seed, drawing in enumerate(drawings)
    ]
    return (np.stack([answer.images[0] for answer in answers]) * 255).round().astype(np.uint8)


def followed(pictures: np.ndarray, drawings: Sequence[Drawing]) -> Followed:
    """How often the thing in a picture is where its drawing has it."""
    asked = [find(drawing.picture)[0] for drawing in drawings]
    found = [find(picture) for picture in pictures]
    seen = [forms[0] if len(forms) == 1 else None for forms in found]
    return Followed(_share_agreeing(seen, asked), _share_agreeing(seen, [*asked[1:], asked[0]]))


def some_anywhere(count: int) -> list[Drawing]:
    """Drawings that no training saw, each of a thing anywhere."""
    rng = random.Random(_TEST_SEED)
    return [draw_anywhere(rng) for _ in range(count)]


def _share_agreeing(seen: list[Form | None], asked: list[Form | None]) -> float:
    return sum(_agree(*pair) for pair in zip(seen, asked, strict=True)) / len(seen)


def _agree(seen: Form | None, asked: Form | None) -> bool:
    if not seen or not asked:
        return False
    return seen.shape == asked.shape and math.hypot(seen.x - asked.x, seen.y - asked.y) <= _TOLERANCE_PX


def main() -> None:
    """Trains the ControlNet and saves it in half precision."""
    parser = argparse.ArgumentParser(prog="python -m training.controlnet", description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("models/shapes"))
    parser.add_argument("--folder", type=Path, default=Path("out/training"), help="where the state of trainings is")
    parser.add_argument("--limit-s", type=float, default=1300, help="CPU seconds of the whole training")
    parser.add_argument("--run-s", type=float, default=float("inf"), help="CPU seconds of this run")
    parser.add_argument("--scenes", type=int, default=6000)
    parser.add_argument("--out", type=Path, default=Path("models/shapes-edges"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    pipe = load(options.model)
    plan = Plan(peak=5e-4, limit_s=options.limit_s, run_s=options.run_s, fall=0.5, decay=0.998)
    training = ControlNetTraining(pipe, make_guided(pipe, options.scenes, seed=20_000), plan, folder=options.folder)
    training.run()
    save_network(training.averaged, options.out, base=options.model.name)


if __name__ == "__main__":
    main()
