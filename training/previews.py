"""Fits a model's preview map: latent to colour, by least squares between the VAE's latents and pictures scaled down.

    python -m training.previews models/shapes
    python -m training.previews models/mine --pictures photos --size-px 512

Writes `preview.json` into the model's folder. Without pictures it draws scenes, which suits models of flat colours;
give a few dozen pictures of what the model draws for any other.
"""

import argparse
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

from darkroom.models.previews import FILE_NAME, PreviewMap, save_map
from training.scenes import make_dataset
from training.vae import to_image_BCHW

DRAWN_COUNT = 600
_SEED = 11
_BATCH = 8
_TEST_SHARE = 5  # every fifth picture is kept for the error that is reported
_PICTURE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True, slots=True)
class Fit:
    """A map and how good it is on pictures that it was not fitted to."""

    preview_map: PreviewMap
    rmse: float
    """Root mean square error of a colour, where colours are 0 to 1."""
    explained: float
    """Share of the colours' variance that the map explains, at most 1."""


def drawn_pictures(count: int, size_px: int) -> Iterator[np.ndarray]:
    """Scenes as pictures [size_px, size_px, 3] uint8; equal arguments give equal pictures."""
    for picture in make_dataset(count, _SEED).pictures:
        yield np.asarray(Image.fromarray(picture).resize((size_px, size_px), Image.Resampling.BICUBIC))


def read_pictures(folder: Path, size_px: int) -> Iterator[np.ndarray]:
    """The folder's pictures by name, cut to their middle square and scaled: [size_px, size_px, 3] uint8."""
    for path in sorted(path for path in folder.iterdir() if path.suffix.lower() in _PICTURE_ENDINGS):
        with Image.open(path) as picture:
            side = min(picture.size)
            left, top = (picture.width - side) // 2, (picture.height - side) // 2
            square = picture.convert("RGB").crop((left, top, left + side, top + side))
            yield np.asarray(square.resize((size_px, size_px), Image.Resampling.LANCZOS))


@torch.no_grad()
def scaled_latents(vae: AutoencoderKL, image_BCHW: torch.Tensor) -> torch.Tensor:
    """Mean latents [B, C, h, w] as the model's denoiser sees them: shifted and scaled as the VAE's config says."""
    config = vae.config
    latents: torch.Tensor = vae.encode(image_BCHW).latent_dist.mean
    if config.latents_mean is not None and config.latents_std is not None:
        mean, deviation = (torch.tensor(v).reshape(1, -1, 1, 1) for v in (config.latents_mean, config.latents_std))
        latents = (latents - mean) / deviation
    else:
        latents = latents - (config.shift_factor or 0.0)
    return latents * float(config.scaling_factor)


def fit_map(vae: AutoencoderKL, pictures: Iterator[np.ndarray]) -> Fit:
    """Fits the map to four of five pictures and measures it on the fifth. Raises ValueError for too few pictures."""
    pairs = [_pixels(vae, np.stack(rows)) for rows in _batches(pictures)]
    count, needed = sum(len(latent) for latent, _ in pairs), 2 * (vae.config.latent_channels + 1)
    is_test = torch.arange(count) % _TEST_SHARE == 0
    if count < _TEST_SHARE or int((~is_test).sum()) * pairs[0][0].shape[1] < needed:
        raise ValueError(f"at least {_TEST_SHARE} pictures and {needed} latent pixels are needed, not {count} pictures")
    latents = torch.cat([latent for latent, _ in pairs])
    colours = torch.cat([colour for _, colour in pairs]).double()
    design = torch.cat([latents, torch.ones(*latents.shape[:2], 1)], dim=2).double()
    solution = torch.linalg.lstsq(design[~is_test].flatten(0, 1), colours[~is_test].flatten(0, 1)).solution
    error = (design[is_test] @ solution - colours[is_test]).square().mean().item()
    variance = colours[is_test].flatten(0, 1).var(0, unbiased=False).mean().item()
    fitted = PreviewMap(solution[:-1].float(), solution[-1].float())
    return Fit(fitted, rmse=math.sqrt(error), explained=1 - error / max(variance, 1e-12))


def _batches(pictures: Iterator[np.ndarray]) -> Iterator[list[np.ndarray]]:
    while rows := list(itertools.islice(pictures, _BATCH)):
        yield rows


def _pixels(vae: AutoencoderKL, pictures_BHW3: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents [B, h · w, C] and the mean colours, 0 to 1, of what each latent pixel covers [B, h · w, 3]."""
    image_BCHW = to_image_BCHW(torch.from_numpy(pictures_BHW3))
    latents = scaled_latents(vae, image_BCHW)
    small = torch.nn.functional.interpolate((image_BCHW + 1) / 2, size=latents.shape[-2:], mode="area")
    return latents.flatten(2).mT, small.flatten(2).mT


def main() -> None:
    """Fits the map of one model and writes it."""
    parser = argparse.ArgumentParser(prog="python -m training.previews", description=__doc__)
    parser.add_argument("folder", type=Path, help="the model, with an AutoencoderKL in its vae folder")
    parser.add_argument("--pictures", type=Path, help="a folder of PNG, JPEG or WebP files; default: drawn scenes")
    parser.add_argument("--size-px", type=int, help="side of the pictures; default: what the VAE was made for")
    options = parser.parse_args()
    vae = AutoencoderKL.from_pretrained(options.folder / "vae", torch_dtype=torch.float32, local_files_only=True)
    size_px = options.size_px or vae.config.sample_size
    pictures = read_pictures(options.pictures, size_px) if options.pictures else drawn_pictures(DRAWN_COUNT, size_px)
    fit = fit_map(vae.eval(), pictures)
    save_map(fit.preview_map, options.folder)
    print(f"{options.folder / FILE_NAME}: error {fit.rmse:.4f} of 1, {fit.explained:.1%} of the variance explained")


if __name__ == "__main__":
    main()
