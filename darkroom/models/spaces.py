"""A model's latent space: how large latents are for an image or video of some size."""

from collections.abc import Sequence

import torch

from darkroom.models.loader import Part
from darkroom.wire.tasks import DecodeTask

# What pipelines call the factors of their VAE. Read off the pipeline, because no two kinds of VAE name them alike.
_SPATIAL = ("vae_scale_factor", "vae_scale_factor_spatial", "vae_spatial_compression_ratio")
_TEMPORAL = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio")


def spatial_factor(part: Part) -> int:
    """Pixels to a latent, along each side."""
    return _factor(part, _SPATIAL)


def temporal_factor(part: Part) -> int:
    """Frames to a latent, after the first, which has one of its own; 1 for images."""
    return _factor(part, _TEMPORAL)


def _factor(part: Part, names: Sequence[str]) -> int:
    return next((int(getattr(part.pipeline, name)) for name in names if hasattr(part.pipeline, name)), 1)


def size_multiple_px(part: Part) -> int:
    """What width and height must be multiples of."""
    return max(part.family.multiple_px, spatial_factor(part) * max(part.family.latent_patch, _patch_size(part)))


def _patch_size(part: Part) -> int:
    """Latents to a token of the denoiser, along each side; packed latents are patched already."""
    if "S" in part.family.latents:
        return 1
    patch = part.denoiser_config.get("patch_size") or 1
    return int(patch[-1] if isinstance(patch, Sequence) else patch)


def latent_shape(part: Part, width_px: int, height_px: int, frame_count: int = 1) -> tuple[int, ...]:
    """Shape of one image's or video's latents, without the batch dimension, in the family's layout."""
    family, factor = part.family, spatial_factor(part)
    height, width = height_px // factor, width_px // factor
    time = (frame_count - 1) // temporal_factor(part) + 1
    sizes = {
        "C": _channels(part),
        "H": height,
        "W": width,
        "T": time,
        "S": time * (height // family.latent_patch) * (width // family.latent_patch),
    }
    return tuple(sizes[dimension] for dimension in family.latents[1:])


def _channels(part: Part) -> int:
    """Of the latents; an inpainting UNet takes more."""
    if part.family.latents == "BCHW" and "latent_channels" in part.pipeline.vae.config:
        return int(part.pipeline.vae.config.latent_channels)
    return int(part.denoiser_config["in_channels"])


def frame_count_of(part: Part, task: DecodeTask, latents: torch.Tensor) -> int:
    """Frames that latents [n, ...] of this size decode to; 0 for images, and where the layout is not known."""
    dimensions = part.family.latents
    if "T" in dimensions:
        time = latents.shape[dimensions.index("T")]
    elif "S" in dimensions and temporal_factor(part) > 1:
        time = latents.shape[1] // latent_shape(part, task.width_px, task.height_px)[0]
    else:
        return 0
    return (time - 1) * temporal_factor(part) + 1
