"""Makes `models/shapes`, from drawn scenes to a folder that StableDiffusionPipeline loads.

    python -m training.shapes --vae-s 900 --denoiser-s 3000 --out models/shapes

Weights are stored in half precision, and config.json says float32: half the bytes, and loaders compute in float32.
"""

import argparse
import copy
import json
import shutil
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from training.denoiser import NOISE_SCHEDULE, DenoiserTraining
from training.evaluate import contact_sheet, evaluate
from training.judge import score
from training.scenes import make_dataset
from training.tokenizer import make_tokenizer
from training.vae import encode_all, reconstruct, refine_decoder, train_vae

DATASET_SEED = 0
_SECONDS_BETWEEN_SNAPSHOTS = 420


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


def save(pipe: StableDiffusionPipeline, folder: Path) -> None:
    """Writes the pipeline in diffusers' directory format, weights in half precision, in one go.

    Files beside the pipeline's own, such as the card, stay.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for name in ("vae", "unet", "text_encoder"):
        getattr(pipe, name).half()
    pipe.save_pretrained(partial, safe_serialization=True)
    for config in partial.glob("*/config.json"):
        entries = json.loads(config.read_text())
        entries.pop("_name_or_path", None)  # where it was loaded from on the machine that trained it
        if config.parent.name == "text_encoder":
            entries["dtype"] = "float32"
        config.write_text(json.dumps(entries, indent=2) + "\n")
    for file in partial.rglob("*.safetensors"):
        file.chmod(0o644)  # safetensors makes them readable by nobody else
    if folder.is_dir():
        for kept in folder.iterdir():
            if kept.is_file() and not (partial / kept.name).exists():
                shutil.copy2(kept, partial)
        shutil.rmtree(folder)
    partial.rename(folder)


def main() -> None:
    """Trains everything within the given times, saving a snapshot of the whole model every few minutes."""
    options = _options()
    torch.set_num_threads(options.threads)
    options.log.parent.mkdir(parents=True, exist_ok=True)
    data = make_dataset(options.scenes, DATASET_SEED)
    pictures = torch.from_numpy(data.pictures)
    if options.vae:
        vae = AutoencoderKL.from_pretrained(options.vae).eval()
    else:
        vae, _ = train_vae(data, steps=100_000, limit_s=options.vae_s, log=options.log)
        vae.save_pretrained(options.out.parent / ".vae-float32")
    start = None
    if options.go_on_from:
        begun = StableDiffusionPipeline.from_pretrained(options.go_on_from, safety_checker=None, dtype=torch.float32)
        start = begun.text_encoder, begun.unet
    training = DenoiserTraining(
        make_tokenizer(), data.scenes, encode_all(vae, pictures) * vae.config.scaling_factor, start=start
    )
    next_s = time.monotonic() + _SECONDS_BETWEEN_SNAPSHOTS

    def snapshot(step: int) -> None:
        nonlocal next_s
        if time.monotonic() > next_s:
            publish(vae, training, options.out, count=60, log=options.log, step=step)
            next_s = time.monotonic() + _SECONDS_BETWEEN_SNAPSHOTS

    if options.denoiser_s:
        training.run(steps=100_000, peak=options.peak, limit_s=options.denoiser_s, log=options.log, each=snapshot)
    if options.decoder_s:
        refine_decoder(vae, data, steps=100_000, limit_s=options.decoder_s, log=options.log)
        vae.save_pretrained(options.out.parent / ".vae-refined")
    note(options.log, f"vae reconstruction {score(reconstruct(vae, pictures[:300]).numpy(), data.scenes[:300])}")
    publish(vae, training, options.out, count=300, log=options.log, step=None)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vae-s", type=float, default=840, help="seconds to train the VAE")
    parser.add_argument("--denoiser-s", type=float, default=4200, help="seconds to train the text encoder and UNet")
    parser.add_argument("--decoder-s", type=float, default=1200, help="seconds to train the decoder on, alone")
    parser.add_argument("--peak", type=float, default=1.2e-3, help="highest learning rate of the denoiser")
    parser.add_argument("--scenes", type=int, default=20000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--vae", type=Path, help="take this trained VAE instead of training one")
    parser.add_argument("--go-on-from", type=Path, help="start from the text encoder and UNet of this model")
    parser.add_argument("--out", type=Path, default=Path("models/shapes"))
    parser.add_argument("--log", type=Path, default=Path("out/training.log"))
    return parser.parse_args()


def publish(
    vae: AutoencoderKL, training: DenoiserTraining, folder: Path, *, count: int, log: Path, step: int | None
) -> None:
    """Saves the averaged networks as a whole model, and logs what the judge makes of its pictures."""
    text_encoder, unet = (copy.deepcopy(network) for network in training.averaged)
    save(assemble(copy.deepcopy(vae), text_encoder, unet, make_tokenizer()), folder)
    result, pictures = evaluate(folder, count)
    contact_sheet(pictures[:60], 12).save(log.parent / "shapes.png")
    note(log, f"{'finished' if step is None else f'step {step}'} {result}")


def note(log: Path, line: str) -> None:
    """Appends a line to the log and prints it."""
    with log.open("a") as out:
        out.write(line + "\n")
    print(line, flush=True)


if __name__ == "__main__":
    main()
