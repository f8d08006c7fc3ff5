"""Tiny models made for one task, and tiny ControlNets: beside the models that have a row of the family table each."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests.tiny import diffusion, flow

MADE_FOR: dict[str, Callable[[], Any]] = {
    "tiny-sd-inpaint": diffusion.stable_diffusion_inpaint,
    "tiny-sdxl-refiner": diffusion.stable_diffusion_xl_refiner,
    "tiny-sd3-wide": partial(flow.stable_diffusion_3, channels=16),  # its inpainting insists on so many
}
CONTROLNETS: dict[str, Callable[[], Any]] = {
    "control-sd": diffusion.controlnet,
    "control-sd-other": diffusion.controlnet,
    "control-sdxl": diffusion.controlnet_xl,
    "control-flux": flow.flux_controlnet,
    "control-flux-other": flow.flux_controlnet,
    "control-qwen": flow.qwen_image_controlnet,
}


def save_variants(root: Path) -> None:
    """Writes all of them into a model store; equal ids give equal weights."""
    for name, make in (MADE_FOR | CONTROLNETS).items():
        torch.manual_seed(sum(name.encode()))
        make().save_pretrained(root / name, safe_serialization=True)
