"""Tiny pipelines of the real classes with random weights: one or more per row of the family table."""

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from tests.tiny import diffusion, flow, video
from tests.tiny.diffusion import BETAS
from tests.tiny.parts import TEXT_WIDTH

__all__ = ["BETAS", "TEXT_WIDTH", "TINY_MODELS", "WITHOUT_ROW", "save_tiny_model"]

TINY_MODELS: dict[str, Callable[[], DiffusionPipeline]] = {
    "tiny-sd": diffusion.stable_diffusion,
    "tiny-sdxl": diffusion.stable_diffusion_xl,
    "tiny-sd3": flow.stable_diffusion_3,
    "tiny-flux": flow.flux,
    "tiny-pixart-alpha": diffusion.pixart_alpha,
    "tiny-pixart-sigma": diffusion.pixart_sigma,
    "tiny-hunyuan-dit": diffusion.hunyuan_dit,
    "tiny-chroma": flow.chroma,
    "tiny-qwen-image": flow.qwen_image,
    "tiny-sana": flow.sana,
    "tiny-aura-flow": flow.aura_flow,
    "tiny-lumina2": flow.lumina_2,
    "tiny-z-image": flow.z_image,
    "tiny-cogview4": flow.cogview_4,
    "tiny-wan": video.wan,
    "tiny-wan-two-experts": video.wan_two_experts,
    "tiny-ltx": video.ltx,
    "tiny-cogvideox": video.cogvideox,
}

WITHOUT_ROW: dict[str, Callable[[], DiffusionPipeline]] = {"tiny-lcm": diffusion.latent_consistency}
"""Of a class that the table does not know."""


def save_tiny_model(root: Path, model_id: str) -> None:
    """Writes one tiny model into a model store; equal ids give equal weights."""
    torch.manual_seed(sum(model_id.encode()))
    make = (TINY_MODELS | WITHOUT_ROW)[model_id]
    make().save_pretrained(root / model_id, safe_serialization=True)
