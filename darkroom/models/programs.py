"""The three programs that stages run: the pipeline's own code, with what another stage does already done or left out.

Each takes a loaded `Part` and a checked task; each runs inside the executor, where network calls are batched.
"""

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from darkroom.errors import InvalidField, InvalidTensor
from darkroom.models.loader import Part
from darkroom.models.tensors import check_finite
from darkroom.schedulers import scheduler_choice, schedulers_for
from darkroom.wire.fields import MAX_IMAGES, check_scheduler, check_size
from darkroom.wire.tasks import DecodeTask, DenoiseTask, EncodeTask

StepCallback = Callable[[int, int], None]
_PIPELINE_MULTIPLE_PX = 8  # every pipeline insists on it, whatever its VAE's factor


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


def denoise(
    part: Part, task: DenoiseTask, embeddings: Mapping[str, torch.Tensor], on_step: StepCallback
) -> torch.Tensor:
    """Runs the pipeline from embeddings to latents [image_count, ...], in the layout of its `output_type="latent"`.

    `on_step(step, step_count)` is called on the engine's thread after each solver step.
    """
    pipeline = _own_copy(part)
    scheduler = _scheduler(part.pipeline.scheduler, task.scheduler)
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


def decode(part: Part, task: DecodeTask, latents: torch.Tensor) -> list[Image.Image]:
    """Runs the pipeline's tail: one step with an absent denoiser, whose solver answers with the finished latents."""
    pipeline = _own_copy(part)
    scheduler = _scheduler(part.pipeline.scheduler, "")
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


def check_request(part: Part, task: DenoiseTask) -> None:
    """Raises InvalidField unless the model can draw this size with this scheduler."""
    factor = 2 ** (len(part.pipeline.vae.config.block_out_channels) - 1)
    patch = part.denoiser_config.get("patch_size", 1) if not part.family.packed_latents else 2
    check_size(task.width_px, task.height_px, max(_PIPELINE_MULTIPLE_PX, factor * patch))
    check_scheduler(task.scheduler, schedulers_for(type(part.pipeline.scheduler).__name__))


def check_embeddings(part: Part, task: DenoiseTask, embeddings: Mapping[str, torch.Tensor]) -> None:
    """Raises InvalidTensor unless these are the embeddings that this model needs at this guidance scale."""
    wanted = part.family.embedding_names(guided=part.family.is_guided(task.guidance_scale))
    for name in wanted:
        if name not in embeddings:
            raise InvalidTensor(name, "is missing from embeddings")
    for name, value in embeddings.items():
        if name not in part.family.embedding_names(guided=True):
            raise InvalidTensor(name[:64], f"is not an embedding of this model, which takes {', '.join(wanted)}")
        dims = 2 if "pooled" in name else 3
        if value.ndim != dims or value.shape[0] != 1:
            raise InvalidTensor(name, f"must be of shape [1, ...] with {dims} dimensions, not {list(value.shape)}")
        width = _embedding_width(part, name)
        if width is not None and value.shape[-1] != width:
            raise InvalidTensor(name, f"has width {value.shape[-1]} where the model needs {width}")
        positive = embeddings.get(name.removeprefix("negative_"), value)
        if value.shape != positive.shape:
            raise InvalidTensor(name, f"has shape {list(value.shape)} where its positive has {list(positive.shape)}")
        check_finite(name, value)


def _embedding_width(part: Part, name: str) -> int | None:
    """Last dimension of the embedding; None where the denoiser's config does not say."""
    width = part.denoiser_config.get(part.family.widths.get(name, ""))
    if not isinstance(width, int):
        return None
    if "pooled" not in name or not part.family.time_id_count:
        return width
    return width - part.family.time_id_count * int(part.denoiser_config["addition_time_embed_dim"])


def check_latents(part: Part, task: DecodeTask, latents: torch.Tensor) -> None:
    """Raises InvalidTensor unless the latents are of this model's latent space and the image's size."""
    config = part.pipeline.vae.config
    factor = 2 ** (len(config.block_out_channels) - 1)
    if task.width_px % factor or task.height_px % factor:
        raise InvalidField("width_px", f"and height_px must be multiples of {factor}")
    height, width, channels = task.height_px // factor, task.width_px // factor, config.latent_channels
    expected = (height // 2 * (width // 2), channels * 4) if part.family.packed_latents else (channels, height, width)
    if latents.ndim and len(latents) > MAX_IMAGES:
        raise InvalidTensor("latents", f"has {len(latents)} rows; at most {MAX_IMAGES} are allowed")
    if tuple(latents.shape[1:]) != expected:
        raise InvalidTensor(
            "latents", f"has shape {list(latents.shape)} where the model and size ask for {['n', *expected]}"
        )
    check_finite("latents", latents)


def _own_copy(part: Part) -> DiffusionPipeline:
    """A pipeline object of the request's own over the same networks: pipelines keep state of a call on themselves."""
    return copy.copy(part.pipeline)


def _scheduler(own: Any, name: str) -> Any:
    """A fresh scheduler over the model's own noise schedule."""
    if not name:
        return type(own).from_config(own.config)
    choice = scheduler_choice(name)
    return getattr(diffusers, choice.class_name).from_config(own.config, **dict(choice.options))


def _generators(seed: int, image_count: int) -> torch.Generator | list[torch.Generator]:
    """Noise sources on the CPU, so that a seed means the same picture on every device."""
    generators = [torch.Generator().manual_seed(seed + i) for i in range(image_count)]
    return generators[0] if image_count == 1 else generators


def _placeholders(part: Part) -> dict[str, torch.Tensor]:
    """Embeddings of one zero each, where the pipeline wants some but no network reads them."""
    return {
        name: torch.zeros(1, 1, device=part.device) if "pooled" in name else torch.zeros(1, 1, 1, device=part.device)
        for name in part.family.embedding_names(guided=False)
    }


@functools.cache
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)
