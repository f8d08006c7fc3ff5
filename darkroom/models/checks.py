"""What a stage checks of a task before it runs: that the loaded model can do what the task asks."""

from collections.abc import Mapping

import torch

from darkroom.errors import InvalidField, InvalidTensor
from darkroom.models.loader import Part
from darkroom.models.spaces import frame_count_of, latent_shape, size_multiple_px, spatial_factor, temporal_factor
from darkroom.models.tensors import check_finite
from darkroom.schedulers import schedulers_for
from darkroom.wire.fields import MAX_IMAGES, check_scheduler, check_size
from darkroom.wire.tasks import DecodeTask, DenoiseTask

_MAX_FRAMES = 1024


def check_request(part: Part, task: DenoiseTask) -> None:
    """Raises InvalidField unless the model can draw this size in so many steps with this scheduler."""
    check_size(task.width_px, task.height_px, size_multiple_px(part))
    if task.step_count < part.family.fewest_steps:
        raise InvalidField("step_count", f"must be at least {part.family.fewest_steps} for this model")
    if task.frame_count and temporal_factor(part) == 1:
        raise InvalidField("frame_count", "must be 0 for this model, which draws images")
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
        dims = 2 if _is_mask(name) or "pooled" in name else 3
        if value.ndim != dims or value.shape[0] != 1:
            raise InvalidTensor(name, f"must be of shape [1, ...] with {dims} dimensions, not {list(value.shape)}")
        if _is_mask(name):
            _check_mask(name, value, embeddings)
        else:
            _check_embedding(part, name, value)
        _check_against_positive(part, name, value, embeddings)


def _is_mask(name: str) -> bool:
    return "mask" in name


def _check_mask(name: str, mask: torch.Tensor, embeddings: Mapping[str, torch.Tensor]) -> None:
    """A mask is one number, 0 or 1, to a token of its embedding, and shows at least one."""
    text = name.replace("attention_mask", "embeds")
    if text in embeddings and mask.shape[1:] != embeddings[text].shape[1:2]:
        raise InvalidTensor(name, f"has shape {list(mask.shape)} where {text} has {list(embeddings[text].shape)}")
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise InvalidTensor(name, "must hold nothing but 0 and 1")
    if not bool(mask.any()):
        raise InvalidTensor(name, "must show at least one token")


def _check_embedding(part: Part, name: str, value: torch.Tensor) -> None:
    if not value.numel():
        raise InvalidTensor(name, "must hold at least one token")
    width = _embedding_width(part, name)
    if width is not None and value.shape[-1] != width:
        raise InvalidTensor(name, f"has width {value.shape[-1]} where the model needs {width}")
    _check_token_count(part, name, value)
    check_finite(name, value)


def _check_token_count(part: Part, name: str, value: torch.Tensor) -> None:
    count = part.denoiser_config.get(part.family.token_counts.get(name, ""))
    if isinstance(count, int) and value.shape[1] != count:
        raise InvalidTensor(name, f"has {value.shape[1]} tokens where the model needs {count}")
    most = part.family.most_tokens.get(name)
    if most is not None and value.shape[1] > most:
        raise InvalidTensor(name, f"has {value.shape[1]} tokens; at most {most} are allowed")


def _check_against_positive(part: Part, name: str, value: torch.Tensor, embeddings: Mapping[str, torch.Tensor]) -> None:
    positive = embeddings.get(name.removeprefix("negative_"), value)
    if part.family.equal_lengths:
        agree = value.shape == positive.shape
    else:
        agree = _is_mask(name) or value.shape[-1] == positive.shape[-1]
    if not agree:
        raise InvalidTensor(name, f"has shape {list(value.shape)} where its positive has {list(positive.shape)}")


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
    factor = spatial_factor(part)
    if task.width_px % factor or task.height_px % factor:
        raise InvalidField("width_px", f"and height_px must be multiples of {factor}")
    if latents.ndim and len(latents) > MAX_IMAGES:
        raise InvalidTensor("latents", f"has {len(latents)} rows; at most {MAX_IMAGES} are allowed")
    if part.family.latents:
        _check_latent_shape(part, task, latents)
    check_finite("latents", latents)


def _check_latent_shape(part: Part, task: DecodeTask, latents: torch.Tensor) -> None:
    frame_count = 1
    if latents.ndim == len(part.family.latents):
        frame_count = max(1, min(frame_count_of(part, task, latents), _MAX_FRAMES))
    expected = latent_shape(part, task.width_px, task.height_px, frame_count)
    if not latents.numel() or tuple(latents.shape[1:]) != expected:
        raise InvalidTensor(
            "latents", f"has shape {list(latents.shape)} where the model and size ask for {['n', *expected]}"
        )
