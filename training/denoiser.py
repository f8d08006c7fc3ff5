"""Trains the text encoder and UNet of `shapes` together: latents from captions, by v-prediction.

v-prediction over a linear schedule (Salimans & Ho 2022, arXiv 2202.00512) that ends in almost pure noise: with the
usual schedule a flat background leaks through the last step's noise, and at inference the noise then picks it.
"""

import copy
import random
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from training.descent import descend
from training.scenes import Scene, loose_caption
from training.tokenizer import MAX_TOKENS
from training.vae import LATENT_CHANNELS

NOISE_SCHEDULE = {
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "prediction_type": "v_prediction",
    "clip_sample": False,
    "steps_offset": 1,
}
TEXT_WIDTH = 128
_EMA_DECAY = 0.998


def make_unet() -> UNet2DConditionModel:
    """An untrained UNet over 8 x 8 latents, cross-attention at both levels."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(64, 128),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """An untrained CLIP text model over the caption vocabulary."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


class DenoiserTraining:
    """The two networks in training, their averaged copies, and the data they learn from."""

    def __init__(
        self,
        tokenizer: CLIPTokenizer,
        scenes: list[Scene],
        latents: torch.Tensor,
        *,
        start: tuple[CLIPTextModel, UNet2DConditionModel] | None = None,
    ) -> None:
        """`latents`: [N, 8, 8, 8], scaled to unit deviation, in `scenes`' order; `start`: networks to go on from."""
        torch.manual_seed(1)
        self._rng = random.Random(1)
        self._tokenizer, self._scenes, self._latents = tokenizer, scenes, latents
        self.text_encoder, self.unet = start or (make_text_encoder(tokenizer), make_unet())
        self.text_encoder.train()
        self.unet.train()
        self._noise = DDPMScheduler(**{k: v for k, v in NOISE_SCHEDULE.items() if k != "steps_offset"})
        self._live = [*self.text_encoder.parameters(), *self.unet.parameters()]
        self._mean_text, self._mean_unet = copy.deepcopy(self.text_encoder).eval(), copy.deepcopy(self.unet).eval()
        self._mean = [*self._mean_text.parameters(), *self._mean_unet.parameters()]

    @property
    def averaged(self) -> tuple[CLIPTextModel, UNet2DConditionModel]:
        """The exponential averages of both networks: what is shipped."""
        return self._mean_text, self._mean_unet

    def loss(self, batch: int) -> torch.Tensor:
        """The v-prediction error of a random batch; one caption in ten is empty, for guidance."""
        rows = torch.randint(len(self._scenes), (batch,))
        texts = ["" if self._rng.random() < 0.1 else loose_caption(self._scenes[i], self._rng) for i in rows.tolist()]
        ids = self._tokenizer(
            texts, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
        ).input_ids
        embedding_BTD = self.text_encoder(ids)[0]
        latent_BCHW = self._latents[rows]
        noise_BCHW = torch.randn_like(latent_BCHW)
        timestep_B = torch.randint(1000, (batch,))
        noisy_BCHW = self._noise.add_noise(latent_BCHW, noise_BCHW, timestep_B)
        target_BCHW = self._noise.get_velocity(latent_BCHW, noise_BCHW, timestep_B)
        return F.mse_loss(self.unet(noisy_BCHW, timestep_B, embedding_BTD).sample, target_BCHW)

    def run(
        self,
        *,
        steps: int,
        batch: int = 64,
        peak: float = 1.2e-3,
        limit_s: float = float("inf"),
        log: Path | None = None,
        each: Callable[[int], None] | None = None,
    ) -> list[float]:
        """Trains for `steps` steps or `limit_s` seconds, whichever ends first. Returns the loss of each step."""
        optimizer = torch.optim.AdamW(self._live, lr=peak, weight_decay=1e-2, betas=(0.9, 0.99), fused=True)

        def after(step: int) -> None:
            self._average(step)
            if each:
                each(step)

        def note(step: int, seconds: float, loss: float) -> None:
            if log:
                with log.open("a") as out:
                    out.write(f"denoiser {step} {seconds:.0f}s loss {loss:.4f}\n")

        return descend(
            lambda: self.loss(batch),
            self._live,
            optimizer,
            peak=peak,
            steps=steps,
            limit_s=limit_s,
            warmup=200,
            note=note,
            each=after,
        )

    @torch.no_grad()
    def _average(self, step: int) -> None:
        decay = min(_EMA_DECAY, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._mean, self._live, 1 - decay)
