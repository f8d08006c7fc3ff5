"""What a pipeline's methods are called with: read off their signatures, and off the family's row."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

from darkroom.families import Family
from darkroom.models.loader import Part
from darkroom.models.spaces import latent_shape

_COUNTS = ("num_images_per_prompt", "num_videos_per_prompt")
_FRAMES = "num_frames"
_OWN = (*_COUNTS, "prompt", "negative_prompt")


@functools.cache
def _parameters(function: Callable[..., Any]) -> Mapping[str, Any]:
    """Names and defaults; a name without a default has `inspect.Parameter.empty`."""
    return {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}


def encode_arguments(part: Part, *, prompt: str, negative_prompt: str, guided: bool) -> dict[str, Any]:
    """What `encode_prompt` is called with: what the pipeline's own call would give it.

    An argument that both methods have, such as the longest text, gets the call's default: the two often disagree.
    """
    kind = type(part.pipeline)
    accepted, of_call = _parameters(kind.encode_prompt), _parameters(kind.__call__)
    defaults = {
        name: of_call[name]
        for name in accepted
        if name in of_call and name not in _OWN and of_call[name] not in (None, inspect.Parameter.empty)
    }
    offered = {
        "prompt": prompt,
        "prompt_2": None,
        "prompt_3": None,
        "device": part.device,
        "do_classifier_free_guidance": guided,
        **dict.fromkeys(_COUNTS, 1),
    }
    if negative_prompt:
        offered["negative_prompt"] = negative_prompt
    if part.max_sequence_length:
        offered["max_sequence_length"] = part.max_sequence_length
    return {**defaults, **{name: value for name, value in offered.items() if name in accepted}}


def named_embeddings(returns: tuple[str | None, ...], answer: Any) -> dict[str, torch.Tensor]:
    """What `encode_prompt` returned, as tensors [1, ...] by name; what the wire cannot hold is changed so that it can.

    A list with one prompt's tensor becomes that tensor with a batch dimension; bool becomes uint8.
    """
    values = answer if isinstance(answer, tuple) else (answer,)
    named: dict[str, torch.Tensor] = {}
    for name, value in zip(returns, values, strict=True):
        if name is None or value is None or (isinstance(value, list) and not value):
            continue
        tensor = value[0][None] if isinstance(value, list) else value
        named[name] = tensor.to(torch.uint8) if tensor.dtype is torch.bool else tensor
    return named


def _given(family: Family, name: str, value: torch.Tensor, dtype: torch.dtype) -> Any:
    """An embedding as the pipeline's call takes it: the opposite of what `named_embeddings` does to it."""
    if "mask" in name and family.masks:
        return value.to(dtype if family.masks == "real" else torch.int64)
    if value.dtype is torch.uint8:
        value = value.bool()
    elif value.is_floating_point():
        value = value.to(dtype)  # not every pipeline casts embeddings it is given
    return list(value) if name in family.listed else value


def call_arguments(
    part: Part,
    embeddings: Mapping[str, torch.Tensor],
    *,
    step_count: int,
    guidance_scale: float,
    width_px: int,
    height_px: int,
    image_count: int,
    frame_count: int = 0,
    kind: type | None = None,
    has_image: bool = False,
) -> dict[str, Any]:
    """What the pipeline is called with, but for noise and output.

    Several images are asked for by as many rows of embeddings: pipelines that are asked for several images to a prompt
    do not all repeat embeddings that they are given. Embeddings are moved to the part's device, those of floating point
    to the denoiser's type. `frame_count` 0 means what the pipeline draws when nobody says. `kind`: the class that is
    called, where that is a variant of the part's own; one that only goes on from an image starts from an empty one,
    unless the request `has_image`.
    """
    accepted = _parameters((kind or type(part.pipeline)).__call__)
    dtype: torch.dtype = part.denoiser.dtype
    arguments: dict[str, Any] = {
        **{name: torch.zeros(image_count, 1, device=part.device) for name in part.family.unread},
        **{
            name: _given(part.family, name, _repeated(value.to(part.device), image_count), dtype)
            for name, value in embeddings.items()
        },
        **part.family.options,
        "num_inference_steps": step_count,
        part.family.guidance: guidance_scale,
    }
    if "width" in accepted:
        arguments |= {"width": width_px, "height": height_px}
    elif kind in (None, type(part.pipeline)) and not has_image:
        empty = torch.zeros(image_count, *latent_shape(part, width_px, height_px), dtype=dtype, device=part.device)
        arguments |= {"image": empty, "strength": 1.0}
    if "negative_prompt" in accepted:
        arguments["negative_prompt"] = None  # a default that is a text would clash with its embedding
    if frame_count and _FRAMES in accepted:
        arguments[_FRAMES] = frame_count
    return arguments


def _repeated(value: torch.Tensor, count: int) -> torch.Tensor:
    return value.repeat(count, *[1] * (value.ndim - 1))
