"""Makes `models/shapes`, from drawn scenes to a folder that StableDiffusionPipeline loads.

    python -m training.shapes --folder out/training --limit-s 6300 --out models/shapes

Stopped at any time, the same command goes on where it was. The VAE and the text encoder come first (`training.vae`,
`training.text`).
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from training.denoiser import NOISE_SCHEDULE, DenoiserTraining
from training.descent import Descent, Plan
from training.evaluate import contact_sheet, easy_scenes, generate, hard_scenes, in_a_line
from training.judge import mark_all
from training.latents import load_latents
from training.saving import save_pipeline
from training.tokenizer import make_tokenizer

STEPS, GUIDANCE = 25, 2.0
_LOOK_EVERY = 1500


def assemble(
    vae: AutoencoderKL, text_encoder: CLIPTextModel, unet: UNet2DConditionModel, tokenizer: CLIPTokenizer
) -> StableDiffusionPipeline:
    """The pipeline as users get it: DDIM over the noise schedule of the training."""
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(**NOISE_SCHEDULE, timestep_spacing="trailing"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def look(pipe: DiffusionPipeline, descent: Descent, folder: Path, *, count: int) -> None:
    """Logs what the judge makes of `count` easy and `count` hard pictures, and keeps a sheet of them."""
    shown = []
    for kind, scenes in (("easy", easy_scenes(count)), ("hard", hard_scenes(count))):
        pictures = generate(pipe, scenes, steps=STEPS, guidance=GUIDANCE)
        descent.note(f"{kind} {in_a_line(mark_all(pictures, scenes))}")
        shown.append(pictures[:30])
    contact_sheet(np.concatenate(shown), 10).save(folder / "shapes.png")


def main() -> None:
    """Trains the UNet, looks at its pictures now and then, and saves the model at the end."""
    options = _options()
    torch.set_num_threads(1)
    vae = AutoencoderKL.from_pretrained(options.folder / "vae").eval()
    text_encoder, tokenizer = CLIPTextModel.from_pretrained(options.folder / "text_encoder").eval(), make_tokenizer()
    data = load_latents(vae, options.folder, options.scenes)
    plan = Plan(
        peak=options.peak,
        limit_s=options.limit_s,
        run_s=options.run_s,
        warmup=300,
        fall=0.3,
        decay=0.999,
        weight_decay=1e-2,
    )
    training = DenoiserTraining(tokenizer, text_encoder, data, plan, folder=options.folder)
    pipe = assemble(vae, text_encoder, training.averaged, tokenizer)

    def each(step: int) -> None:
        if step % _LOOK_EVERY == 0:
            with torch.random.fork_rng():
                look(pipe, training.descent, options.folder, count=40)

    training.run(each=each)
    save_pipeline(pipe, options.out, steps=STEPS, guidance=GUIDANCE)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m training.shapes", description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("out/training"), help="where the state of trainings is")
    parser.add_argument("--limit-s", type=float, default=6300, help="CPU seconds of the whole training")
    parser.add_argument("--run-s", type=float, default=float("inf"), help="CPU seconds of this run")
    parser.add_argument("--peak", type=float, default=1e-3, help="highest learning rate")
    parser.add_argument("--scenes", type=int, default=16000)
    parser.add_argument("--out", type=Path, default=Path("models/shapes"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
