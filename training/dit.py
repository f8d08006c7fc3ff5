"""Trains `shapes-dit`, a transformer in Flux's classes, by flow matching over the family's latents.

Flux rather than SD3, since diffusers caches its blocks and splits it over devices. Two trainings: flow matching (Lipman
et al. 2023, arXiv 2210.02747; noise levels as in Esser et al. 2024, arXiv 2403.03206) from captions, one in ten empty;
then guidance is distilled into the transformer's guidance embedding (Meng et al. 2023, arXiv 2210.03142), as in Flux
itself, so that a picture needs one forward a step. The pooled embedding is that of `shapes`' text encoder; T5 comes
first (`training.text --kind t5`).

    python -m training.dit --shapes models/shapes --out models/shapes-dit
"""

import argparse
import copy
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
)
from transformers import T5EncoderModel, T5Tokenizer

from training.denoiser import loose_captions
from training.descent import Descent, Plan
from training.evaluate import load
from training.latents import Latents, load_latents
from training.saving import save_pipeline
from training.scenes import loose_caption
from training.text import TEXT_WIDTH, embed, token_ids
from training.tokenizer import MAX_TOKENS, make_t5_tokenizer
from training.vae import LATENT_CHANNELS

STEPS, GUIDANCE = 20, 3.0
_HEAD_WIDTH, _HEADS = 32, 4
_SIDE = 8  # tokens along a side: latents of 16 x 16 in pieces of 2 x 2
_MOST_GUIDANCE = 6.0


def make_transformer() -> FluxTransformer2DModel:
    """An untrained transformer over 64 tokens of a picture and those of its caption."""
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=_HEAD_WIDTH,
        num_attention_heads=_HEADS,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        axes_dims_rope=(8, 12, 12),
        guidance_embeds=True,
    )


class Conditions:
    """What a caption becomes on its way to the transformer: T5's tokens, and the pooled embedding of `shapes`."""

    def __init__(self, shapes: DiffusionPipeline, tokenizer: T5Tokenizer, text_encoder: T5EncoderModel) -> None:
        self._shapes, self._tokenizer, self._text_encoder = shapes, tokenizer, text_encoder

    @torch.no_grad()
    def of(self, texts: list[str]) -> dict[str, torch.Tensor]:
        """The transformer's arguments that say what to draw."""
        pooled = self._shapes.text_encoder(token_ids(self._shapes.tokenizer, texts))
        return {
            "encoder_hidden_states": embed(self._tokenizer, self._text_encoder, texts),
            "pooled_projections": pooled.pooler_output,
            "txt_ids": torch.zeros(MAX_TOKENS, 3),
            "img_ids": positions(),
        }


def positions() -> torch.Tensor:
    """Row and column of each token of a picture, as Flux counts them: [64, 3]."""
    rows, columns = torch.meshgrid(torch.arange(_SIDE), torch.arange(_SIDE), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=2).flatten(0, 1).float()


def pack(latent_BCHW: torch.Tensor) -> torch.Tensor:
    """Latents [B, 4, 16, 16] as the transformer's tokens [B, 64, 16]."""
    pieces = latent_BCHW.unflatten(3, (_SIDE, 2)).unflatten(2, (_SIDE, 2))  # [B, C, 8, 2, 8, 2]
    packed_BTC: torch.Tensor = pieces.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    return packed_BTC


def noised(latent_BTC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens under noise of a random level, the level [B], and the velocity from picture to noise."""
    level_B = torch.sigmoid(torch.randn(len(latent_BTC)) + 0.2)
    noise_BTC = torch.randn_like(latent_BTC)
    level_B11 = level_B[:, None, None]
    return (1 - level_B11) * latent_BTC + level_B11 * noise_BTC, level_B, noise_BTC - latent_BTC


def flow_loss(
    transformer: FluxTransformer2DModel, latent_BCHW: torch.Tensor, conditions: dict[str, torch.Tensor]
) -> torch.Tensor:
    """The error of the velocity under noise of random levels, at guidance 1."""
    noisy_BTC, level_B, velocity_BTC = noised(pack(latent_BCHW))
    plain_B = torch.ones(len(latent_BCHW))
    return F.mse_loss(transformer(noisy_BTC, timestep=level_B, guidance=plain_B, **conditions).sample, velocity_BTC)


class DitTraining:
    """The transformer in training, by flow matching."""

    def __init__(
        self,
        shapes: StableDiffusionPipeline,
        text_encoder: T5EncoderModel,
        data: Latents,
        plan: Plan,
        *,
        folder: Path | None = None,
    ) -> None:
        torch.manual_seed(8)
        self._data, self._conditions = data, Conditions(shapes, make_t5_tokenizer(), text_encoder)
        self._transformer = make_transformer().train()
        self.descent = Descent("dit", {"transformer": self._transformer}, plan, seed=8, folder=folder)

    @property
    def averaged(self) -> FluxTransformer2DModel:
        """The average of the transformer."""
        return self.descent.averaged("transformer")

    def loss(self, batch: int) -> torch.Tensor:
        """The error of the velocity, at guidance 1."""
        scenes, latent_BCHW = self._data.take(batch, self.descent.rng)
        conditions = self._conditions.of(loose_captions(scenes, self.descent.rng))
        return flow_loss(self._transformer, latent_BCHW, conditions)

    def run(self, *, batch: int = 32, each: Callable[[int], None] = lambda _step: None) -> list[float]:
        """Trains until the plan ends; `each` is called after each step. Returns the loss of each step."""
        return self.descent.run(lambda: self.loss(batch), each=each)


class GuidanceTraining:
    """The transformer learning to answer at once what it answers under guidance of any scale."""

    def __init__(
        self,
        shapes: StableDiffusionPipeline,
        text_encoder: T5EncoderModel,
        teacher: FluxTransformer2DModel,
        data: Latents,
        plan: Plan,
        *,
        folder: Path | None = None,
    ) -> None:
        self._data, self._teacher = data, teacher.requires_grad_(requires_grad=False)
        self._student = copy.deepcopy(teacher).train().requires_grad_()
        self._conditions = Conditions(shapes, make_t5_tokenizer(), text_encoder)
        self.descent = Descent("dit-guidance", {"transformer": self._student}, plan, seed=9, folder=folder)

    @property
    def averaged(self) -> FluxTransformer2DModel:
        """The average of the student: what is shipped."""
        return self.descent.averaged("transformer")

    def loss(self, batch: int) -> torch.Tensor:
        """The distance from the teacher's guided velocity."""
        scenes, latent_BCHW = self._data.take(batch, self.descent.rng)
        texts = [loose_caption(scene, self.descent.rng) for scene in scenes]
        noisy_BTC, level_B, _ = noised(pack(latent_BCHW))
        scale_B = 1 + (_MOST_GUIDANCE - 1) * torch.rand(batch)
        given = {"timestep": level_B, **self._conditions.of(texts)}
        with torch.no_grad():
            plain_B = torch.ones(batch)
            guided_BTC = self._teacher(noisy_BTC, guidance=plain_B, **given).sample
            given_nothing = {"timestep": level_B, **self._conditions.of([""] * batch)}
            unguided_BTC = self._teacher(noisy_BTC, guidance=plain_B, **given_nothing).sample
        target_BTC = unguided_BTC + scale_B[:, None, None] * (guided_BTC - unguided_BTC)
        return F.mse_loss(self._student(noisy_BTC, guidance=scale_B, **given).sample, target_BTC)

    def run(self, *, batch: int = 32) -> list[float]:
        """Trains until the plan ends. Returns the loss of each step."""
        return self.descent.run(lambda: self.loss(batch))


def assemble(
    shapes: StableDiffusionPipeline, text_encoder: T5EncoderModel, transformer: FluxTransformer2DModel
) -> FluxPipeline:
    """The pipeline as users get it. Ask it for 128 px and a `max_sequence_length` of 32."""
    pipe = FluxPipeline(
        vae=shapes.vae,
        text_encoder=shapes.text_encoder,
        tokenizer=shapes.tokenizer,
        text_encoder_2=text_encoder,
        tokenizer_2=make_t5_tokenizer(),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.5),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def main() -> None:
    """Trains the transformer, then its guidance, and saves the model."""
    parser = argparse.ArgumentParser(prog="python -m training.dit", description=__doc__)
    parser.add_argument("--shapes", type=Path, default=Path("models/shapes"), help="whose VAE and text encoder to use")
    parser.add_argument("--folder", type=Path, default=Path("out/training"), help="where the state of trainings is")
    parser.add_argument("--limit-s", type=float, default=4700, help="CPU seconds of the whole training")
    parser.add_argument("--guidance-s", type=float, default=1200, help="CPU seconds of distilling guidance")
    parser.add_argument("--run-s", type=float, default=float("inf"), help="CPU seconds of this run of either")
    parser.add_argument("--peak", type=float, default=1e-3, help="highest learning rate")
    parser.add_argument("--scenes", type=int, default=16000)
    parser.add_argument("--out", type=Path, default=Path("models/shapes-dit"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    shapes = load(options.shapes)
    text_encoder = T5EncoderModel.from_pretrained(options.folder / "text_encoder_2").eval()
    data = load_latents(shapes.vae, options.folder, options.scenes)
    plan = Plan(peak=options.peak, limit_s=options.limit_s, run_s=options.run_s, warmup=300, fall=0.3, decay=0.999)
    training = DitTraining(shapes, text_encoder, data, plan, folder=options.folder)
    training.run()
    transformer = training.averaged
    if training.descent.is_done:
        plan = Plan(peak=3e-4, limit_s=options.guidance_s, run_s=options.run_s, fall=0.5, decay=0.998)
        guided = GuidanceTraining(shapes, text_encoder, transformer, data, plan, folder=options.folder)
        guided.run()
        transformer = guided.averaged
    pipe = assemble(shapes, text_encoder, transformer)
    save_pipeline(pipe, options.out, steps=STEPS, guidance=GUIDANCE, max_sequence_length=MAX_TOKENS)


if __name__ == "__main__":
    main()
