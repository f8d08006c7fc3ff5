"""Makes `models/shapes`, from drawn scenes to a folder that StableDiffusionPipeline loads.

    python -m training.shapes --folder out/training --limit-s 6300 --out models/shapes

Stopped at any time, the same command goes on where it was. The VAE and the text encoder come first (`training.vae`,
`training.text`).
Weights are stored in half precision, and config.json says float32: half the bytes, and loaders compute in float32.
"""

import argparse
import copy
import json
import shutil
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
from training.scenes import SIZE_PX
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


def save(pipe: DiffusionPipeline, folder: Path, *, steps: int, guidance: float, **more: int) -> None:
    """Writes the pipeline in diffusers' directory format, weights in half precision, in one go.

    `steps` and `guidance` are what the model is asked for where nobody says otherwise; `more` goes to darkroom.json as
    well. Files beside the pipeline's own,
    such as the card, stay. The networks given are left as they are.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    halved = copy.deepcopy(pipe)
    for part in halved.components.values():
        if isinstance(part, torch.nn.Module):
            part.half()
    halved.save_pretrained(partial, safe_serialization=True)
    for config in partial.glob("*/config.json"):
        entries = json.loads(config.read_text())
        entries.pop("_name_or_path", None)  # where it was loaded from on the machine that trained it
        if config.parent.name.startswith("text_encoder"):
            entries["dtype"] = "float32"
        config.write_text(json.dumps(entries, indent=2) + "\n")
    sides = dict.fromkeys(("default_width_px", "default_height_px"), SIZE_PX)
    defaults = {**sides, "default_step_count": steps, "default_guidance_scale": guidance, **more}
    (partial / "darkroom.json").write_text(json.dumps(defaults) + "\n")
    for file in partial.rglob("*.safetensors"):
        file.chmod(0o644)  # safetensors makes them readable by nobody else
    if folder.is_dir():
        for kept in folder.iterdir():
            if kept.is_file() and not (partial / kept.name).exists():
                shutil.copy2(kept, partial)
        shutil.rmtree(folder)
    partial.rename(folder)


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
    save(pipe, options.out, steps=STEPS, guidance=GUIDANCE)


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
