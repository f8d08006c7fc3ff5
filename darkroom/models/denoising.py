"""The denoiser's program: the pipeline's own loop from embeddings to latents, every step seen."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from darkroom.models.loader import Part
from darkroom.models.own import fresh_scheduler, own_copy
from darkroom.wire.tasks import DenoiseTask

StepCallback = Callable[[int, int], None]


def denoise(
    part: Part, task: DenoiseTask, embeddings: Mapping[str, torch.Tensor], on_step: StepCallback
) -> torch.Tensor:
    """Runs the pipeline from embeddings to latents [image_count, ...], in the layout of its `output_type="latent"`.

    `on_step(step, step_count)` is called on the engine's thread after each solver step.
    """
    pipeline = own_copy(part)
    scheduler = fresh_scheduler(part.pipeline.scheduler, task.scheduler)
    real_step = scheduler.step
    done = 0

    @functools.wraps(real_step)  # pipelines read its signature to learn whether to pass the generator
    def step(*args: Any, **kwargs: Any) -> Any:
        nonlocal done
        answer = real_step(*args, **kwargs)
        done += 1
        on_step(done, len(scheduler.timesteps))
        return answer

    scheduler.step = step
    pipeline.scheduler = scheduler
    dtype = getattr(part.pipeline, part.family.denoiser).dtype  # not every pipeline casts embeddings it is given
    latents: torch.Tensor = pipeline(
        **{name: value.to(part.device, dtype) for name, value in embeddings.items()},
        num_inference_steps=task.step_count,
        guidance_scale=task.guidance_scale,
        width=task.width_px,
        height=task.height_px,
        num_images_per_prompt=task.image_count,
        generator=_generators(task.seed, task.image_count),
        output_type="latent",
        return_dict=False,
    )[0]
    return latents


def _generators(seed: int, image_count: int) -> torch.Generator | list[torch.Generator]:
    """Noise sources on the CPU, so that a seed means the same picture on every device."""
    generators = [torch.Generator().manual_seed(seed + i) for i in range(image_count)]
    return generators[0] if image_count == 1 else generators
