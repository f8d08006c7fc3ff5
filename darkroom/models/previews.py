"""Small pictures of latents that are not finished, by a linear map from a latent's channels to red, green and blue.

A map is fitted to a model's VAE beforehand (`python -m training.previews FOLDER`) and lies in the model's folder as
`preview.json`: {"format": 1, "weights": [[red, green, blue] per channel], "bias": [red, green, blue]}, for colours from
0 to 1. A preview has one pixel per latent pixel; who shows it scales it up.

B images, C channels, F frames, H and W latent pixels, L patches, D numbers per patch.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from darkroom.errors import UnusableModel

FILE_NAME = "preview.json"
MEDIA_TYPE = "image/jpeg"
_FORMAT = 1
_COLOURS = 3
_MAX_FILE_BYTES = 1 << 16
_MAX_CHANNELS = 256
_MAX_WEIGHT = 1e3
# JPEG without colour subsampling takes 0.2 ms at 128 x 128, PNG at its fastest 1 to 2 ms.
_JPEG_QUALITY = 90
_IMAGE_DIMENSIONS, _VIDEO_DIMENSIONS = 4, 5

Unpack = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class PreviewMap:
    """colour = latent · weights + bias, with colours from 0 to 1 and latents as the denoiser scales them."""

    weights: torch.Tensor
    """[C, 3]."""
    bias: torch.Tensor
    """[3]."""

    @property
    def channel_count(self) -> int:
        """Channels of the latents that the map is for."""
        return len(self.weights)

    def draw(self, latents: torch.Tensor, unpack: Unpack | None = None) -> list[bytes]:
        """One JPEG file per image, of W x H pixels: latents [B, C, H, W], or the middle frame of [B, C, F, H, W].

        `unpack` brings latents of another layout into one of these. Values that are not finite come out black or
        white. Raises ValueError for another count of channels.
        """
        return [_encoded(pixels) for pixels in self.pixels(latents, unpack)]

    def pixels(self, latents: torch.Tensor, unpack: Unpack | None = None) -> torch.Tensor:
        """Pixels [B, H, W, 3] uint8 in host memory: one copy from the device. Arguments as for `draw`."""
        latents = unpack(latents) if unpack else latents
        if latents.ndim == _VIDEO_DIMENSIONS:
            latents = latents[:, :, latents.shape[2] // 2]
        if latents.ndim != _IMAGE_DIMENSIONS or latents.shape[1] != self.channel_count:
            raise ValueError(f"latents must be [B, {self.channel_count}, H, W], not {list(latents.shape)}")
        count, _, height, width = latents.shape
        rows = latents.detach().permute(0, 2, 3, 1).reshape(-1, self.channel_count).float()
        colours = torch.addmm(self.bias.to(rows.device), rows, self.weights.to(rows.device))
        whole = colours.mul_(255).round_().nan_to_num_(0.0).clamp_(0, 255).to(torch.uint8)
        return whole.reshape(count, height, width, _COLOURS).cpu()


def _encoded(pixels_HW3: torch.Tensor) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels_HW3.numpy()).save(file, format="JPEG", quality=_JPEG_QUALITY, subsampling=0)
    return file.getvalue()


def unpack_patches(latents_BLD: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Sequences of 2 x 2 patches [B, H/2 · W/2, 4 C], Flux's layout, as [B, C, H, W]. `height`, `width`: H and W."""
    count, _, depth = latents_BLD.shape
    patches = latents_BLD.reshape(count, height // 2, width // 2, depth // 4, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(count, depth // 4, height, width)


def load_map(folder: Path) -> PreviewMap | None:
    """The map in a model's folder, None where there is none. Raises UnusableModel for a file that is no map."""
    try:
        with (folder / FILE_NAME).open("rb") as file:
            text = file.read(_MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UnusableModel(folder.name, f"its {FILE_NAME} cannot be read") from error
    if len(text) > _MAX_FILE_BYTES:
        raise UnusableModel(folder.name, f"its {FILE_NAME} has more than {_MAX_FILE_BYTES} bytes")
    try:
        return _parsed(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise UnusableModel(folder.name, f"its {FILE_NAME} is no preview map: {error}") from error


def _parsed(content: Any) -> PreviewMap:
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(f"it is not of format {_FORMAT}")
    weights, bias = content.get("weights"), content.get("bias")
    if not isinstance(weights, list) or not 0 < len(weights) <= _MAX_CHANNELS or not all(map(_is_colour, weights)):
        raise ValueError(f"weights must be 1 to {_MAX_CHANNELS} rows of {_COLOURS} numbers")
    if not _is_colour(bias):
        raise ValueError(f"bias must be {_COLOURS} numbers")
    return PreviewMap(torch.tensor(weights, dtype=torch.float32), torch.tensor(bias, dtype=torch.float32))


def _is_colour(values: Any) -> bool:
    return isinstance(values, list) and len(values) == _COLOURS and all(map(_is_weight, values))


def _is_weight(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= _MAX_WEIGHT  # False for NaN


def save_map(preview_map: PreviewMap, folder: Path) -> None:
    """Writes the map into a model's folder, with six significant digits; a reader never sees half a file."""
    content = {
        "format": _FORMAT,
        "weights": [[_short(value) for value in row] for row in preview_map.weights.tolist()],
        "bias": [_short(value) for value in preview_map.bias.tolist()],
    }
    partial = folder / f".{FILE_NAME}.partial"
    partial.write_text(json.dumps(content) + "\n")
    partial.replace(folder / FILE_NAME)


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def clean_estimate(
    solver: Any, before: torch.Tensor, after: torch.Tensor, predicted: torch.Tensor | None
) -> torch.Tensor:
    """What to show after a solver's step: its estimate of the finished latents, which has no noise in it.

    `before`, `after`: the sample that the step took and made; `predicted`: the `pred_original_sample` of its output, if
    it has one. Solvers that return none mostly hold one all the same: the DPM-Solver++ and UniPC families keep it as
    their newest model output, and where the path is straight (flow matching, x = (1 - σ) x0 + σ ε) the step's own two
    samples lead to σ = 0. Others give `after`, noise and all.
    """
    if predicted is not None:
        return predicted
    kept = getattr(solver, "model_outputs", None)
    newest = kept[-1] if kept else None
    if _keeps_clean(solver.config) and isinstance(newest, torch.Tensor) and newest.shape == after.shape:
        return newest
    step = getattr(solver, "step_index", None)
    if type(solver).__name__ == "FlowMatchEulerDiscreteScheduler" and step:
        start, end = solver.sigmas[step - 1], solver.sigmas[step]
        straight: torch.Tensor = after - (after - before) * (end / (end - start)).to(after.dtype)
        return straight
    return after


def _keeps_clean(config: Any) -> bool:
    return config.get("algorithm_type") in ("dpmsolver++", "sde-dpmsolver++") or config.get("predict_x0") is True
