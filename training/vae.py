"""Trains the AutoencoderKL of `shapes`: 64 x 64 x 3 pictures to 8 x 8 x 8 latents and back.

A shape covers a tenth of the picture, so plain losses learn the background and leave every shape brown; the loss here
counts shape and background alike.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from training.descent import descend
from training.scenes import SIZE_PX, Dataset

LATENT_CHANNELS = 8
_PEAK_RATE = 1.5e-3


def make_vae() -> AutoencoderKL:
    """An untrained VAE of factor 8."""
    return AutoencoderKL(
        block_out_channels=(16, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        layers_per_block=1,
        sample_size=SIZE_PX,
    )


def to_image_BCHW(pictures: torch.Tensor) -> torch.Tensor:
    """[B, H, W, 3] uint8 to [B, 3, H, W] float in [-1, 1]."""
    return pictures.permute(0, 3, 1, 2).float() / 127.5 - 1


def balance(mask_BHW: torch.Tensor) -> torch.Tensor:
    """Weights [B, 1, H, W] of mean 1 under which shape and background count the same in each picture."""
    shape = mask_BHW.float()[:, None] / 255
    area = shape.mean((2, 3), keepdim=True).clamp(min=0.01)
    return 0.5 * shape / area + 0.5 * (1 - shape) / (1 - area)


def vae_loss(vae: AutoencoderKL, image_BCHW: torch.Tensor, weight_B1HW: torch.Tensor) -> torch.Tensor:
    """Balanced L1 + 0.5 MSE + 1e-5 KL (sum over latents, per picture)."""
    posterior = vae.encode(image_BCHW).latent_dist
    error = vae.decode(posterior.sample()).sample - image_BCHW
    reconstruction = (weight_B1HW * (error.abs() + 0.5 * error**2)).mean()
    loss: torch.Tensor = reconstruction + 1e-5 * posterior.kl().mean()
    return loss


def train_vae(
    data: Dataset, *, steps: int, batch: int = 24, limit_s: float = float("inf"), log: Path | None = None
) -> tuple[AutoencoderKL, list[float]]:
    """Trains for `steps` steps or `limit_s` seconds, whichever ends first. Returns the VAE and the loss of each step.

    The scaling factor is set so that latents have unit deviation.
    """
    torch.manual_seed(0)
    vae = make_vae().train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=_PEAK_RATE, weight_decay=1e-4)
    pictures, masks = torch.from_numpy(data.pictures), torch.from_numpy(data.masks)

    def loss() -> torch.Tensor:
        rows = torch.randint(len(pictures), (batch,))
        images = to_image_BCHW(pictures[rows]).contiguous(memory_format=torch.channels_last)
        return vae_loss(vae, images, balance(masks[rows]))

    learned = list(vae.parameters())
    losses = descend(
        loss, learned, optimizer, peak=_PEAK_RATE, steps=steps, limit_s=limit_s, warmup=100, note=_noter(log, "vae")
    )
    vae = vae.eval().to(memory_format=torch.contiguous_format)
    vae.register_to_config(scaling_factor=round(1 / encode_all(vae, pictures[:1000]).std().item(), 5))
    return vae, losses


def refine_decoder(
    vae: AutoencoderKL,
    data: Dataset,
    *,
    steps: int,
    batch: int = 24,
    limit_s: float = float("inf"),
    log: Path | None = None,
) -> list[float]:
    """Trains the decoder on, under the encoder as it is, so a denoiser trained on its latents stays right.

    Latents get a little noise, a tenth of their deviation, as a denoiser leaves some too. Returns each step's loss.
    """
    torch.manual_seed(2)
    pictures, masks = torch.from_numpy(data.pictures), torch.from_numpy(data.masks)
    latents = encode_all(vae, pictures)
    noise = 0.1 * latents.std()
    vae.decoder.train().to(memory_format=torch.channels_last)
    learned = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    optimizer = torch.optim.AdamW(learned, lr=_PEAK_RATE, weight_decay=1e-4)

    def loss() -> torch.Tensor:
        rows = torch.randint(len(pictures), (batch,))
        noisy = latents[rows] + noise * torch.randn_like(latents[rows])
        error = vae.decode(noisy.contiguous(memory_format=torch.channels_last)).sample - to_image_BCHW(pictures[rows])
        weighted: torch.Tensor = balance(masks[rows]) * error.abs()
        return weighted.mean()

    losses = descend(
        loss, learned, optimizer, peak=_PEAK_RATE, steps=steps, limit_s=limit_s, warmup=50, note=_noter(log, "decoder")
    )
    vae.decoder.eval().to(memory_format=torch.contiguous_format)
    return losses


def _noter(log: Path | None, name: str) -> Callable[[int, float, float], None]:
    def note(step: int, seconds: float, loss: float) -> None:
        if log:
            with log.open("a") as out:
                out.write(f"{name} {step} {seconds:.0f}s loss {loss:.4f}\n")

    return note


@torch.no_grad()
def encode_all(vae: AutoencoderKL, pictures: torch.Tensor) -> torch.Tensor:
    """Mean latents [N, 8, 8, 8] of pictures [N, H, W, 3] uint8, unscaled."""
    return torch.cat([vae.encode(to_image_BCHW(rows)).latent_dist.mean for rows in pictures.split(100)])


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, pictures: torch.Tensor) -> torch.Tensor:
    """Pictures through the VAE and back: [N, H, W, 3] uint8 both ways."""
    images: torch.Tensor = vae.decode(encode_all(vae, pictures)).sample
    return ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
