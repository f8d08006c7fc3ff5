"""Distils `shapes` into `shapes-turbo`: a small UNet that draws in two steps without guidance.

Progressive distillation (Salimans & Ho 2022, arXiv 2202.00512): one step of the student is to land where two of the
teacher's do, by DDIM. The student has half of the teacher's channels, neither its innermost level nor its middle, and
is shown few scenes of two things: few steps alone make no lighter model for a cascade, since of prompts that leave
nothing open even the teacher needs few. VAE and text encoder stay the teacher's.

    python -m training.distil --teacher models/shapes --out models/shapes-turbo
"""

import argparse
from collections import deque
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

from training.denoiser import make_noise
from training.descent import Descent, Plan
from training.evaluate import load
from training.latents import Latents, load_latents
from training.saving import save_pipeline
from training.scenes import loose_caption
from training.text import embed

STEPS = 2
_TEACHER_STEPS = 2  # for each of the student's
_NARROWER = 2
_HARD_SHARE = 0.1  # of the lessons: what the student does not learn is left to the teacher
_REUSE, _KEPT_COUNT = 4, 64
"""How often a batch of the teacher's is learned from, on average, and how many are kept: it costs thrice a step."""


def make_student(teacher: UNet2DConditionModel) -> UNet2DConditionModel:
    """An untrained UNet half as wide as the teacher, without its innermost level and middle."""
    config = teacher.config
    return UNet2DConditionModel(
        **{key: value for key, value in config.items() if not key.startswith("_")}
        | {
            "down_block_types": config.down_block_types[:-1],
            "mid_block_type": None,
            "up_block_types": config.up_block_types[1:],
            "block_out_channels": [width // _NARROWER for width in config.block_out_channels[:-1]],
            "norm_num_groups": config.norm_num_groups // _NARROWER,
        }
    )


class Distillation:
    """The student in training, and the frozen teacher it learns from."""

    def __init__(
        self, teacher: StableDiffusionPipeline, data: Latents, plan: Plan, *, folder: Path | None = None
    ) -> None:
        self._teacher, self._data = teacher, data
        self._kept: deque[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]] = deque(maxlen=_KEPT_COUNT)
        self._guide: UNet2DConditionModel = teacher.unet.to(memory_format=torch.channels_last)
        torch.manual_seed(7)
        self._student = make_student(self._guide).train().to(memory_format=torch.channels_last)
        self._guide.requires_grad_(requires_grad=False)
        alphas = make_noise().alphas_cumprod
        grid = torch.linspace(0, len(alphas), STEPS * _TEACHER_STEPS + 1).round().long()[1:]
        self._timesteps = grid - 1
        # Index 0 is the picture itself; n is the n-th time step of the grid.
        self._signals = torch.cat([torch.ones(1), alphas[self._timesteps]]).sqrt()
        self._noises = (1 - self._signals**2).sqrt()
        self.descent = Descent("turbo", {"unet": self._student}, plan, seed=7, folder=folder)

    @property
    def averaged(self) -> UNet2DConditionModel:
        """The average of the student: what is shipped."""
        return self.descent.averaged("unet")

    @property
    def timesteps(self) -> list[int]:
        """Those at which the student is asked, the noisiest first."""
        return [int(timestep) for timestep in self._timesteps[_TEACHER_STEPS - 1 :: _TEACHER_STEPS].flip(0)]

    def loss(self, batch: int) -> torch.Tensor:
        """The squared error of the velocity that leads in one step to where the teacher comes in several."""
        if not self._kept or self.descent.rng.random() < 1 / _REUSE:
            self._kept.append(self._lesson(batch))
        noisy_BCHW, from_B, embedding_BTD, target_BCHW = self.descent.rng.choice(self._kept)
        return F.mse_loss(self._velocity(self._student, noisy_BCHW, from_B, embedding_BTD), target_BCHW)

    @torch.no_grad()
    def _lesson(self, batch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Latents under noise, their time steps, their captions' embeddings, and the velocities to learn."""
        scenes, latent_BCHW = self._data.take(batch, self.descent.rng)
        embedding_BTD = self._embed([loose_caption(scene, self.descent.rng) for scene in scenes])
        from_B = _TEACHER_STEPS * torch.randint(1, STEPS + 1, (batch,))
        noisy_BCHW = self._signal(from_B) * latent_BCHW + self._noise(from_B) * torch.randn_like(latent_BCHW)
        return noisy_BCHW, from_B, embedding_BTD, self._target(noisy_BCHW, from_B, embedding_BTD)

    def run(self, *, batch: int = 32) -> list[float]:
        """Trains until the plan ends. Returns the loss of each step."""
        return self.descent.run(lambda: self.loss(batch))

    def _embed(self, texts: list[str]) -> torch.Tensor:
        return embed(self._teacher.tokenizer, self._teacher.text_encoder, texts)

    def _velocity(
        self, unet: UNet2DConditionModel, noisy_BCHW: torch.Tensor, at_B: torch.Tensor, embedding_BTD: torch.Tensor
    ) -> torch.Tensor:
        velocity_BCHW: torch.Tensor = unet(noisy_BCHW, self._timesteps[at_B - 1], embedding_BTD).sample
        return velocity_BCHW

    def _target(self, noisy_BCHW: torch.Tensor, from_B: torch.Tensor, embedding_BTD: torch.Tensor) -> torch.Tensor:
        """The velocity whose one step of DDIM ends where the teacher's several do."""
        reached_BCHW = noisy_BCHW
        for step in range(_TEACHER_STEPS):
            reached_BCHW = self._solve(reached_BCHW, from_B - step, embedding_BTD)
        to_B = from_B - _TEACHER_STEPS
        share = self._noise(to_B) / self._noise(from_B)
        picture_BCHW = (reached_BCHW - share * noisy_BCHW) / (self._signal(to_B) - share * self._signal(from_B))
        target_BCHW: torch.Tensor = (self._signal(from_B) * noisy_BCHW - picture_BCHW) / self._noise(from_B)
        return target_BCHW

    def _solve(self, noisy_BCHW: torch.Tensor, from_B: torch.Tensor, embedding_BTD: torch.Tensor) -> torch.Tensor:
        """One step of DDIM down the grid, by the teacher."""
        velocity_BCHW = self._velocity(self._guide, noisy_BCHW, from_B, embedding_BTD)
        picture_BCHW = self._signal(from_B) * noisy_BCHW - self._noise(from_B) * velocity_BCHW
        noise_BCHW = self._noise(from_B) * noisy_BCHW + self._signal(from_B) * velocity_BCHW
        nearer_BCHW: torch.Tensor = self._signal(from_B - 1) * picture_BCHW + self._noise(from_B - 1) * noise_BCHW
        return nearer_BCHW

    def _signal(self, at_B: torch.Tensor) -> torch.Tensor:
        return self._signals[at_B][:, None, None, None]

    def _noise(self, at_B: torch.Tensor) -> torch.Tensor:
        return self._noises[at_B][:, None, None, None]


def assemble(teacher: StableDiffusionPipeline, student: UNet2DConditionModel) -> StableDiffusionPipeline:
    """The pipeline as users get it: the teacher's own solver takes the student's steps."""
    scheduler = DDIMScheduler.from_config(teacher.scheduler.config)
    pipe = StableDiffusionPipeline(
        **{**teacher.components, "unet": student, "scheduler": scheduler}, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def main() -> None:
    """Distils the teacher and saves the student."""
    parser = argparse.ArgumentParser(prog="python -m training.distil", description=__doc__)
    parser.add_argument("--teacher", type=Path, default=Path("models/shapes"))
    parser.add_argument("--folder", type=Path, default=Path("out/training"), help="where the state of trainings is")
    parser.add_argument("--limit-s", type=float, default=750, help="CPU seconds of the whole training")
    parser.add_argument("--run-s", type=float, default=float("inf"), help="CPU seconds of this run")
    parser.add_argument("--scenes", type=int, default=16000)
    parser.add_argument("--out", type=Path, default=Path("models/shapes-turbo"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    teacher = load(options.teacher)
    data = load_latents(teacher.vae, options.folder, options.scenes).mostly_easy(_HARD_SHARE)
    plan = Plan(peak=1e-3, limit_s=options.limit_s, run_s=options.run_s, fall=0.5, decay=0.998)
    distillation = Distillation(teacher, data, plan, folder=options.folder)
    distillation.run()
    save_pipeline(assemble(teacher, distillation.averaged), options.out, steps=STEPS, guidance=1.0)


if __name__ == "__main__":
    main()
