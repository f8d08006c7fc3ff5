"""Distils `shapes` into `shapes-turbo`, which draws in four steps without guidance.

Latent consistency distillation (Luo et al. 2023, arXiv 2310.04378): wherever on the way from noise to picture the
student stands, it names the picture at once, and where it stands a solver step later must not change its answer. The
solver's step is the teacher's, under guidance, so that guidance is learned too. The student's target is the student
itself (Song & Dhariwal 2023, arXiv 2310.14189); its average is shipped. VAE and text encoder stay the teacher's.

    python -m training.distil --teacher models/shapes --out models/shapes-turbo
"""

import argparse
import copy
from pathlib import Path

import torch
from diffusers import LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel

from training.denoiser import NOISE_SCHEDULE, make_noise
from training.descent import Descent, Plan
from training.evaluate import load
from training.latents import Latents, load_latents
from training.saving import save_pipeline
from training.scenes import loose_caption
from training.text import embed

STEPS, TEACHER_GUIDANCE = 4, 3.0
_GRID = 50  # solver steps from noise to picture; LCMScheduler's original_inference_steps
_HUBER = 0.03  # where the loss turns from squares to absolute values, for latents of unit deviation


class Distillation:
    """The student in training, and the frozen teacher it learns from."""

    def __init__(
        self, teacher: StableDiffusionPipeline, data: Latents, plan: Plan, *, folder: Path | None = None
    ) -> None:
        self._teacher, self._data = teacher, data
        self._guide: UNet2DConditionModel = teacher.unet.to(memory_format=torch.channels_last)
        self._student = copy.deepcopy(self._guide).train()
        self._guide.requires_grad_(requires_grad=False)
        alphas = make_noise().alphas_cumprod
        self._timesteps = torch.arange(1, _GRID + 1) * (len(alphas) // _GRID) - 1
        # Index 0 is the picture itself; n is the n-th time step of the grid.
        self._signals = torch.cat([torch.ones(1), alphas[self._timesteps]]).sqrt()
        self._noises = (1 - self._signals**2).sqrt()
        self.descent = Descent("turbo", {"unet": self._student}, plan, seed=7, folder=folder)

    @property
    def averaged(self) -> UNet2DConditionModel:
        """The average of the student: what is shipped."""
        return self.descent.averaged("unet")

    def loss(self, batch: int) -> torch.Tensor:
        """How far the student's answers at both ends of one solver step lie apart (pseudo-Huber)."""
        scenes, latent_BCHW = self._data.take(batch, self.descent.rng)
        embedding_BTD = self._embed([loose_caption(scene, self.descent.rng) for scene in scenes])
        from_B = torch.randint(1, _GRID + 1, (batch,))
        noisy_BCHW = self._signal(from_B) * latent_BCHW + self._noise(from_B) * torch.randn_like(latent_BCHW)
        answer_BCHW = self._picture(self._student, noisy_BCHW, from_B, embedding_BTD)
        with torch.no_grad():
            nearer_BCHW = self._solve(noisy_BCHW, from_B, embedding_BTD)
            there_BCHW = self._picture(self._student, nearer_BCHW, (from_B - 1).clamp(min=1), embedding_BTD)
            target_BCHW = torch.where(from_B[:, None, None, None] == 1, nearer_BCHW, there_BCHW)
        return ((answer_BCHW - target_BCHW).square() + _HUBER**2).sqrt().mean() - _HUBER

    def run(self, *, batch: int = 32) -> list[float]:
        """Trains until the plan ends. Returns the loss of each step."""
        return self.descent.run(lambda: self.loss(batch))

    def _embed(self, texts: list[str]) -> torch.Tensor:
        return embed(self._teacher.tokenizer, self._teacher.text_encoder, texts)

    def _picture(
        self, unet: UNet2DConditionModel, noisy_BCHW: torch.Tensor, at_B: torch.Tensor, embedding_BTD: torch.Tensor
    ) -> torch.Tensor:
        """The picture that a network sees in noise."""
        velocity_BCHW = unet(noisy_BCHW, self._timesteps[at_B - 1], embedding_BTD).sample
        picture_BCHW: torch.Tensor = self._signal(at_B) * noisy_BCHW - self._noise(at_B) * velocity_BCHW
        return picture_BCHW

    def _solve(self, noisy_BCHW: torch.Tensor, from_B: torch.Tensor, embedding_BTD: torch.Tensor) -> torch.Tensor:
        """One step of DDIM down the grid, by the teacher under guidance."""
        timestep_B = self._timesteps[from_B - 1]
        unguided_BTD = self._embed([""]).expand_as(embedding_BTD)
        both = self._guide(
            noisy_BCHW.repeat(2, 1, 1, 1), timestep_B.repeat(2), torch.cat([unguided_BTD, embedding_BTD])
        )
        unguided_BCHW, guided_BCHW = both.sample.chunk(2)
        velocity_BCHW = unguided_BCHW + TEACHER_GUIDANCE * (guided_BCHW - unguided_BCHW)
        picture_BCHW = self._signal(from_B) * noisy_BCHW - self._noise(from_B) * velocity_BCHW
        noise_BCHW = self._noise(from_B) * noisy_BCHW + self._signal(from_B) * velocity_BCHW
        nearer_BCHW: torch.Tensor = self._signal(from_B - 1) * picture_BCHW + self._noise(from_B - 1) * noise_BCHW
        return nearer_BCHW

    def _signal(self, at_B: torch.Tensor) -> torch.Tensor:
        return self._signals[at_B][:, None, None, None]

    def _noise(self, at_B: torch.Tensor) -> torch.Tensor:
        return self._noises[at_B][:, None, None, None]


def make_scheduler() -> LCMScheduler:
    """The solver of the student, over the teacher's schedule."""
    return LCMScheduler(**{**NOISE_SCHEDULE, "steps_offset": 1}, original_inference_steps=_GRID)


def assemble(teacher: StableDiffusionPipeline, student: UNet2DConditionModel) -> StableDiffusionPipeline:
    """The pipeline as users get it."""
    parts = {**teacher.components, "unet": student, "scheduler": make_scheduler()}
    pipe = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def main() -> None:
    """Distils the teacher and saves the student."""
    parser = argparse.ArgumentParser(prog="python -m training.distil", description=__doc__)
    parser.add_argument("--teacher", type=Path, default=Path("models/shapes"))
    parser.add_argument("--folder", type=Path, default=Path("out/training"), help="where the state of trainings is")
    parser.add_argument("--limit-s", type=float, default=5000, help="CPU seconds of the whole training")
    parser.add_argument("--run-s", type=float, default=float("inf"), help="CPU seconds of this run")
    parser.add_argument("--scenes", type=int, default=24000)
    parser.add_argument("--out", type=Path, default=Path("models/shapes-turbo"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    teacher = load(options.teacher)
    data = load_latents(teacher.vae, options.folder, options.scenes)
    plan = Plan(peak=3e-4, limit_s=options.limit_s, run_s=options.run_s, fall=0.5, decay=0.998)
    distillation = Distillation(teacher, data, plan, folder=options.folder)
    distillation.run()
    save_pipeline(assemble(teacher, distillation.averaged), options.out, steps=STEPS, guidance=1.0)


if __name__ == "__main__":
    main()
