"""The programs of the encoder and the VAE: the pipeline's own code, with what another stage does done or left out.

Each takes a loaded `Part` and a checked task; each runs inside the executor, where network calls are batched. The
denoiser's program is in `denoising`.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image

from darkroom.models.loader import Part
from darkroom.models.own import fresh_scheduler, own_copy
from darkroom.wire.tasks import DecodeTask, EncodeTask


def encode(part: Part, task: EncodeTask) -> dict[str, torch.Tensor]:
    """Runs `encode_prompt`. Returns embeddings [1, ...] by the names under which the pipeline's call takes them."""
    offered = {
        "prompt": task.prompt,
        "prompt_2": None,
        "prompt_3": None,
        "negative_prompt": task.negative_prompt or None,
        "device": part.device,
        "num_images_per_prompt": 1,
        "do_classifier_free_guidance": task.guided,
    }
    method = part.pipeline.encode_prompt
    accepted = _parameters(type(part.pipeline).encode_prompt)
    answer = method(**{name: value for name, value in offered.items() if name in accepted})
    wanted = part.family.embedding_names(guided=task.guided)
    return {
        name: value
        for name, value in zip(part.family.encode_returns, answer, strict=True)
        if name in wanted and value is not None
    }


def decode(part: Part, task: DecodeTask, latents: torch.Tensor) -> list[Image.Image]:
    """Runs the pipeline's tail: one step with an absent denoiser, whose solver answers with the finished latents."""
    pipeline = own_copy(part)
    scheduler = fresh_scheduler(part.pipeline.scheduler, "")
    finished = latents.to(part.device, part.pipeline.vae.dtype)
    scheduler.step = functools.wraps(scheduler.step)(lambda *_args, **_kwargs: (finished,))
    pipeline.scheduler = scheduler
    images: list[Image.Image] = pipeline(
        **_placeholders(part),
        num_inference_steps=1,
        guidance_scale=0.0,
        width=task.width_px,
        height=task.height_px,
        num_images_per_prompt=len(latents),
        output_type="pil",
        return_dict=False,
    )[0]
    return images


def _placeholders(part: Part) -> dict[str, torch.Tensor]:
    """Embeddings of one zero each, where the pipeline wants some but no network reads them."""
    return {
        name: torch.zeros(1, 1, device=part.device) if "pooled" in name else torch.zeros(1, 1, 1, device=part.device)
        for name in part.family.embedding_names(guided=False)
    }


@functools.cache
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)
