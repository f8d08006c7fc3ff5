"""Trains the UNet of `shapes`: latents from captions, by v-prediction, under a text encoder that stays as it is.

v-prediction over a linear schedule (Salimans & Ho 2022, arXiv 2202.00512) that ends in almost pure noise: with the
usual schedule a flat background leaks through the last step's noise, and at inference the noise then picks it.
"""

import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from training.descent import Descent, Plan
from training.latents import Latents
from training.scenes import Scene, loose_caption
from training.text import TEXT_WIDTH, embed
from training.vae import LATENT_CHANNELS

NOISE_SCHEDULE = {
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "prediction_type": "v_prediction",
    "clip_sample": False,
    "steps_offset": 1,
}
_UNGUIDED_SHARE = 0.1
_MOST_RATIO = 5.0


def make_unet() -> UNet2DConditionModel:
    """An untrained UNet over 16 x 16 latents.

    On a CPU convolutions at 16 x 16 and attention at 4 x 4 cost most for what they bring: the first level is narrow,
    and attention with the text is at 8 x 8 and in the middle.
    """
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 96, 160),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
        resnet_time_scale_shift="scale_shift",
    )


@cache
def make_noise() -> DDPMScheduler:
    """The noise that is added in training."""
    return DDPMScheduler(**{key: value for key, value in NOISE_SCHEDULE.items() if key != "steps_offset"})


def loose_captions(scenes: list[Scene], rng: random.Random) -> list[str]:
    """A caption of each scene; one in ten is empty, for guidance."""
    return ["" if rng.random() < _UNGUIDED_SHARE else loose_caption(scene, rng) for scene in scenes]


def velocity_loss(
    unet: UNet2DConditionModel,
    latent_BCHW: torch.Tensor,
    embedding_BTD: torch.Tensor,
    steer: Callable[[torch.Tensor, torch.Tensor], dict[str, Any]] = lambda _noisy, _timestep: {},
) -> torch.Tensor:
    """The v-prediction error under noise of random levels; `steer` adds to the UNet's arguments, as ControlNets do.

    What is left to learn where there is hardly any noise is the VAE's own grain, so these levels count less: an error
    of the picture counts at most as at a signal-to-noise ratio of 5 (half of Hang et al. 2023, arXiv 2303.09556).
    """
    schedule = make_noise()
    noise_BCHW = torch.randn_like(latent_BCHW)
    timestep_B = torch.randint(1000, (len(latent_BCHW),))
    noisy_BCHW = schedule.add_noise(latent_BCHW, noise_BCHW, timestep_B)
    target_BCHW = schedule.get_velocity(latent_BCHW, noise_BCHW, timestep_B)
    guess_BCHW = unet(noisy_BCHW, timestep_B, embedding_BTD, **steer(noisy_BCHW, timestep_B)).sample
    # A velocity's error is the picture's times (ratio + 1), and 1 - alpha is 1 / (ratio + 1).
    weight_B = ((_MOST_RATIO + 1) * (1 - schedule.alphas_cumprod[timestep_B])).clamp(max=1)
    loss: torch.Tensor = (weight_B * (guess_BCHW - target_BCHW).square().mean((1, 2, 3))).mean()
    return loss


class DenoiserTraining:
    """The UNet in training, its average, and the data it learns from."""

    def __init__(
        self,
        tokenizer: CLIPTokenizer,
        text_encoder: CLIPTextModel,
        data: Latents,
        plan: Plan,
        *,
        folder: Path | None = None,
    ) -> None:
        torch.manual_seed(1)
        self._tokenizer, self._text_encoder, self._data = tokenizer, text_encoder, data
        self._unet = make_unet().train().to(memory_format=torch.channels_last)
        self.descent = Descent("denoiser", {"unet": self._unet}, plan, seed=1, folder=folder)

    @property
    def averaged(self) -> UNet2DConditionModel:
        """The average of the UNet: what is shipped."""
        return self.descent.averaged("unet")

    def loss(self, batch: int) -> torch.Tensor:
        """The v-prediction error of a random batch."""
        scenes, latent_BCHW = self._data.take(batch, self.descent.rng)
        embedding_BTD = embed(self._tokenizer, self._text_encoder, loose_captions(scenes, self.descent.rng))
        return velocity_loss(self._unet, latent_BCHW, embedding_BTD)

    def run(self, *, batch: int = 32, each: Callable[[int], None] = lambda _step: None) -> list[float]:
        """Trains until the plan ends; `each` is called after each step. Returns the loss of each step."""
        return self.descent.run(lambda: self.loss(batch), each=each)
