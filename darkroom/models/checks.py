"""What a stage checks of a task before it runs: that the loaded model can do what the task asks."""

from collections.abc import Mapping

import torch

from darkroom.errors import InvalidField, InvalidTensor
from darkroom.models.loader import Part
from darkroom.models.tensors import check_finite
from darkroom.schedulers import schedulers_for
from darkroom.wire.fields import MAX_IMAGES, check_scheduler, check_size
from darkroom.wire.tasks import DecodeTask, DenoiseTask

_PIPELINE_MULTIPLE_PX = 8  # every pipeline insists on it, whatever its VAE's factor


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
