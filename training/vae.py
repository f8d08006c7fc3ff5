"""Trains the AutoencoderKL of the family: 128 x 128 x 3 pictures to 16 x 16 x 4 latents and back.

Three things keep a small VAE honest on flat pictures. A shape covers a tenth of the picture, and plain losses learn the
background and leave every shape brown: the loss counts shape and background alike. With attention it keeps one colour
for the whole picture, which fails at the second thing: there is no attention, and it learns from crops. And colours
are asked to be a linear function of the latents: denoisers learn them sooner, and previews show them.

    python -m training.vae --folder out/training --limit-s 3600
    python -m training.vae --folder out/training --decoder --limit-s 1200
"""

import argparse
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import nn

from training.descent import Descent, Plan
from training.scenes import SIZE_PX, STYLES, Drawing, draw, random_scene

LATENT_CHANNELS = 4
FACTOR = 8
_CROP_PX = 64  # a crop costs a quarter of a picture and holds most of what there is to learn
_STYLED_SHARE = 0.4
_LEFT_NOISE = 0.1  # where latents deviate by about 1
_DEVIATION_SEED = 12


def make_vae() -> AutoencoderKL:
    """An untrained VAE of factor 8."""
    return AutoencoderKL(
        block_out_channels=(16, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        layers_per_block=1,
        mid_block_add_attention=False,
        sample_size=SIZE_PX,
        shift_factor=0.0,  # Flux's pipeline adds it
    )


def to_image_BCHW(pictures: torch.Tensor) -> torch.Tensor:
    """[B, H, W, 3] uint8 to [B, 3, H, W] float in [-1, 1], channels last."""
    return pictures.permute(0, 3, 1, 2).float() / 127.5 - 1


def balance(coverage_BHW: torch.Tensor) -> torch.Tensor:
    """Weights [B, 1, H, W] of mean 1 under which shapes, 0 to 1, and background count the same in each picture."""
    shape = coverage_BHW[:, None]
    area = shape.mean((2, 3), keepdim=True).clamp(0.02, 0.98)
    return 0.5 * shape / area + 0.5 * (1 - shape) / (1 - area)


class Crops:
    """Batches of freshly drawn scenes, each cut to a random square."""

    def __init__(self, rng: random.Random, size_px: int = _CROP_PX) -> None:
        self._rng, self._size_px = rng, size_px

    def take(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Pictures [B, 3, h, w] in [-1, 1] and how much of each pixel shapes cover [B, h, w], 0 to 1."""
        drawn = [self._cut(draw(random_scene(self._rng), self._rng, self._style())) for _ in range(count)]
        pictures, masks = (torch.stack(parts) for parts in zip(*drawn, strict=True))
        return to_image_BCHW(pictures), masks.float() / 255

    def _style(self) -> str:
        """Flat as a rule; the others too, so that LoRAs can be trained in these latents."""
        return self._rng.choice(STYLES) if self._rng.random() < _STYLED_SHARE else "flat"

    def _cut(self, drawing: Drawing) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = (self._rng.randint(0, SIZE_PX - self._size_px) for _ in range(2))
        window = slice(y, y + self._size_px), slice(x, x + self._size_px)
        return torch.from_numpy(drawing.picture[window]), torch.from_numpy(drawing.masks.max(0)[window])


def vae_loss(
    vae: AutoencoderKL, colours: nn.Module, image_BCHW: torch.Tensor, weight_B1HW: torch.Tensor
) -> torch.Tensor:
    """Balanced L1 + 0.5 MSE + 2e-5 KL (sum over latents, per picture) + 0.2 MSE of `colours` from the latents.

    The decoder gets latents with a little noise on top, as a denoiser leaves some too: nothing may hang on a trifle.
    """
    posterior = vae.encode(image_BCHW).latent_dist
    latent_BCHW = posterior.sample() + _LEFT_NOISE * torch.randn_like(posterior.mean)
    error = vae.decode(latent_BCHW).sample - image_BCHW
    reconstruction = (weight_B1HW * (error.abs() + 0.5 * error**2)).mean()
    shown = F.mse_loss(colours(latent_BCHW), F.avg_pool2d(image_BCHW, FACTOR))
    loss: torch.Tensor = reconstruction + 2e-5 * posterior.kl().mean() + 0.2 * shown
    return loss


def train_vae(
    plan: Plan, *, batch: int = 24, folder: Path | None = None, start: AutoencoderKL | None = None
) -> tuple[AutoencoderKL, list[float]]:
    """Returns the VAE and the loss of each step. The scaling factor is set so that latents have unit deviation."""
    torch.manual_seed(0)
    vae = (start or make_vae()).train().to(memory_format=torch.channels_last)
    colours = nn.Conv2d(LATENT_CHANNELS, 3, 1)
    descent = Descent("vae", {"vae": vae, "colours": colours}, plan, seed=0, folder=folder)
    crops = Crops(descent.rng)

    def loss() -> torch.Tensor:
        image_BCHW, coverage_BHW = crops.take(batch)
        return vae_loss(vae, colours, image_BCHW, balance(coverage_BHW))

    losses = descent.run(loss)
    trained: AutoencoderKL = descent.averaged("vae").eval()
    image_BCHW, _ = Crops(random.Random(_DEVIATION_SEED), SIZE_PX).take(200)
    with torch.no_grad():
        deviation = trained.encode(image_BCHW).latent_dist.mean.std().item()
    trained.register_to_config(scaling_factor=round(1 / deviation, 5))
    return trained, losses


def refine_decoder(vae: AutoencoderKL, plan: Plan, *, batch: int = 24, folder: Path | None = None) -> list[float]:
    """Trains the decoder on, under the encoder as it is, so that denoisers trained on its latents stay right.

    Latents get a little noise, a tenth of their deviation, as a denoiser leaves some too. Returns each step's loss.
    """
    vae.requires_grad_(requires_grad=False)
    decoder = nn.ModuleList([vae.decoder, vae.post_quant_conv]).train().requires_grad_()
    vae.to(memory_format=torch.channels_last)
    descent = Descent("decoder", {"decoder": decoder}, plan, seed=2, folder=folder)
    crops, noise = Crops(descent.rng), _LEFT_NOISE / vae.config.scaling_factor

    def loss() -> torch.Tensor:
        image_BCHW, coverage_BHW = crops.take(batch)
        with torch.no_grad():
            latent_BCHW = vae.encode(image_BCHW).latent_dist.mean
        error = vae.decode(latent_BCHW + noise * torch.randn_like(latent_BCHW)).sample - image_BCHW
        weighted: torch.Tensor = balance(coverage_BHW) * error.abs()
        return weighted.mean()

    losses = descent.run(loss)
    decoder.load_state_dict(descent.averaged("decoder").state_dict())
    decoder.eval()
    return losses


@torch.no_grad()
def encode_all(vae: AutoencoderKL, pictures: torch.Tensor) -> torch.Tensor:
    """Mean latents [N, 4, 16, 16] of pictures [N, H, W, 3] uint8, unscaled."""
    return torch.cat([vae.encode(to_image_BCHW(rows)).latent_dist.mean for rows in pictures.split(50)])


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, pictures: torch.Tensor) -> torch.Tensor:
    """Pictures through the VAE and back: [N, H, W, 3] uint8 both ways."""
    parts = [vae.decode(encode_all(vae, rows)).sample for rows in pictures.split(50)]
    images = torch.cat(parts).clamp(-1, 1)
    return ((images + 1) * 127.5).round().byte().permute(0, 2, 3, 1)


def main() -> None:
    """Trains the VAE, or its decoder on, into `folder`/vae."""
    parser = argparse.ArgumentParser(prog="python -m training.vae", description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("out/training"))
    parser.add_argument("--decoder", action="store_true", help="train the decoder alone, under the encoder as it is")
    parser.add_argument("--start", type=Path, help="start from this VAE")
    parser.add_argument("--limit-s", type=float, default=3600, help="CPU seconds of the whole training")
    parser.add_argument("--run-s", type=float, default=float("inf"), help="CPU seconds of this run")
    parser.add_argument("--peak", type=float, default=1.5e-3, help="highest learning rate")
    options = parser.parse_args()
    torch.set_num_threads(1)
    plan = Plan(peak=options.peak, limit_s=options.limit_s, run_s=options.run_s, decay=0.995)
    start = AutoencoderKL.from_pretrained(options.start) if options.start else None
    if options.decoder:
        vae = start or AutoencoderKL.from_pretrained(options.folder / "vae")
        refine_decoder(vae, plan, folder=options.folder)
    else:
        vae, _ = train_vae(plan, folder=options.folder, start=start)
    vae.save_pretrained(options.folder / "vae")


if __name__ == "__main__":
    main()
