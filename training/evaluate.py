"""Draws random scenes with a model and has the judge read them back: the model's figures, with intervals.

python -m training.evaluate --model models/shapes --count 300 --sheet docs/images/shapes.png
"""

import argparse
import math
import random
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from training.judge import Score, score
from training.scenes import Scene, caption, make_dataset, random_scene

STEPS, GUIDANCE = 25, 4.0
_SCENES_SEED = 2026


@torch.no_grad()
def generate(
    pipe: StableDiffusionPipeline, scenes: list[Scene], *, steps: int = STEPS, guidance: float = GUIDANCE, seed: int = 0
) -> np.ndarray:
    """Draws each scene's canonical caption, seeds counted up from `seed`. Returns [N, H, W, 3] uint8."""
    pictures = []
    for start in range(0, len(scenes), 25):
        part = scenes[start : start + 25]
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(part))]
        answer = pipe(
            [caption(s) for s in part],
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=generators,
            output_type="np",
        )
        pictures.append((answer.images * 255).round().astype(np.uint8))
    return np.concatenate(pictures)


def contact_sheet(pictures: np.ndarray, columns: int, scale: int = 2) -> Image.Image:
    """Pictures [N, H, W, 3] side by side, `columns` in a row; the last row is dropped if it is not full."""
    rows = [
        np.concatenate(list(pictures[i : i + columns]), axis=1) for i in range(0, len(pictures) - columns + 1, columns)
    ]
    sheet = Image.fromarray(np.concatenate(rows))
    return sheet.resize((sheet.width * scale, sheet.height * scale), Image.Resampling.NEAREST)


def evaluate(folder: Path, count: int, *, steps: int = STEPS, guidance: float = GUIDANCE) -> tuple[Score, np.ndarray]:
    """Draws `count` random scenes with the model in `folder` and reads them back with the judge."""
    rng = random.Random(_SCENES_SEED)
    scenes = [random_scene(rng) for _ in range(count)]
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pictures = generate(pipe, scenes, steps=steps, guidance=guidance)
    return score(pictures, scenes), pictures


def interval(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share seen in `count` trials (Wilson 1927, JASA 22)."""
    z = 1.96
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return middle - half, middle + half


def report(title: str, result: Score) -> None:
    """Prints each attribute's share with its interval."""
    print(f"{title} ({result.count} pictures)")
    for name, share in asdict(result).items():
        if name != "count":
            low, high = interval(share, result.count)
            print(f"  {name:10} {share:6.1%}   95 % interval {low:6.1%} to {high:6.1%}")


def main() -> None:
    """Measures the judge on drawn truth, then the model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("models/shapes"))
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--sheet", type=Path, help="write a contact sheet of the first 60 pictures here")
    options = parser.parse_args()
    truth = make_dataset(2000, seed=99)
    report("The judge on drawn truth", score(truth.pictures, truth.scenes))
    result, pictures = evaluate(options.model, options.count, steps=options.steps, guidance=options.guidance)
    report(f"{options.model} at {options.steps} steps, guidance {options.guidance:g}", result)
    if options.sheet:
        options.sheet.parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(pictures[:60], 12).save(options.sheet)


if __name__ == "__main__":
    main()
