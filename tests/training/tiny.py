"""What the trainings' tests train: untrained networks of the family's kind, a few latents, twenty steps."""

import numpy as np
import torch
from diffusers import StableDiffusionPipeline

from training.denoiser import make_unet
from training.descent import Plan
from training.latents import Latents
from training.scenes import random_scenes
from training.shapes import assemble
from training.text import make_text_encoder
from training.tokenizer import make_tokenizer
from training.vae import make_vae

PLAN = Plan(peak=2e-3, steps=20, warmup=5, decay=0.9)


def falls(losses: list[float]) -> bool:
    """Whether the last losses are lower than the first."""
    return bool(np.mean(losses[-5:]) < np.mean(losses[:5]))


def tiny_shapes() -> StableDiffusionPipeline:
    """The pipeline of `shapes`, untrained."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    return assemble(make_vae().eval(), make_text_encoder(tokenizer).eval(), make_unet().eval(), tokenizer)


def latents(count: int = 32) -> Latents:
    """Scenes whose latents are noise."""
    torch.manual_seed(1)
    return Latents(random_scenes(count, seed=6), torch.randn(count, 4, 16, 16).half())
