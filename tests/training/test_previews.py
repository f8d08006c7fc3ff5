"""Fitting a preview map: it finds a map that is there, and reads the VAE's scale as the denoiser does."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from darkroom.models.previews import load_map
from tests.shipped import SHAPES
from training.previews import drawn_pictures, fit_map, read_pictures, scaled_latents
from training.scenes import SIZE_PX


def tiny_vae(**options: object) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=16,
        latent_channels=4,
        **options,
    ).eval()


class Pooled(torch.nn.Module):
    """Encodes each 2 x 2 block as its mean colour, as a VAE would say it: a map that a fit has to find."""

    def __init__(self) -> None:
        super().__init__()
        self.config = tiny_vae(scaling_factor=0.5, shift_factor=0.25).config
        self.config["latent_channels"] = 3

    def encode(self, image_BCHW: torch.Tensor) -> "Pooled":
        self.mean = torch.nn.functional.avg_pool2d(image_BCHW, 2).flip(1)
        return self

    @property
    def latent_dist(self) -> "Pooled":
        return self


def test_it_finds_the_map_that_is_there() -> None:
    fit = fit_map(Pooled(), drawn_pictures(20, 16))
    # latent = (2 colour - 1 - 0.25) / 2 with the channels in reverse, so colour = latent + 0.625
    torch.testing.assert_close(fit.preview_map.weights, torch.eye(3).flip(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fit.preview_map.bias, torch.full((3,), 0.625), rtol=1e-4, atol=1e-4)
    assert fit.rmse < 1e-5
    assert fit.explained > 0.999


@pytest.mark.parametrize(
    ("options", "shift", "scale"),
    [
        ({"scaling_factor": 2.0}, torch.zeros(4), torch.full((4,), 2.0)),
        ({"scaling_factor": 2.0, "shift_factor": 0.3}, torch.full((4,), 0.3), torch.full((4,), 2.0)),
        (
            {"scaling_factor": 2.0, "latents_mean": (1, 2, 3, 4), "latents_std": (1, 1, 2, 2)},
            torch.tensor([1.0, 2, 3, 4]),
            torch.tensor([2.0, 2, 1, 1]),
        ),
    ],
)
def test_latents_are_scaled_as_the_denoiser_sees_them(
    options: dict[str, object], shift: torch.Tensor, scale: torch.Tensor
) -> None:
    vae, image = tiny_vae(**options), torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        expected = (vae.encode(image).latent_dist.mean - shift.reshape(1, 4, 1, 1)) * scale.reshape(1, 4, 1, 1)
    torch.testing.assert_close(scaled_latents(vae, image), expected)


def test_too_few_pictures_are_refused() -> None:
    for count in (0, 4):
        with pytest.raises(ValueError, match="at least"):
            fit_map(tiny_vae(), iter(list(drawn_pictures(5, 16))[:count]))


def test_pictures_of_a_folder_are_cut_square_and_scaled(tmp_path: Path) -> None:
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 200
    Image.fromarray(wide).save(tmp_path / "b.png")
    Image.fromarray(wide[..., 0]).save(tmp_path / "a.webp", lossless=True)
    (tmp_path / "notes.txt").write_text("no picture")
    pictures = list(read_pictures(tmp_path, 8))
    assert [picture.shape for picture in pictures] == [(8, 8, 3)] * 2
    assert all((picture == 200).all() for picture in pictures)


def test_the_shipped_map_is_the_one_the_code_fits() -> None:
    vae = AutoencoderKL.from_pretrained(SHAPES / "vae", torch_dtype=torch.float32).eval()
    fit, shipped = fit_map(vae, drawn_pictures(600, SIZE_PX)), load_map(SHAPES)
    assert shipped is not None
    torch.testing.assert_close(fit.preview_map.weights, shipped.weights, rtol=1e-3, atol=1e-3)
    assert 0.4 < fit.explained < 1
