"""Draws random scenes with a model and has the judge read them back: the model's figures, with intervals.

python -m training.evaluate --model models/shapes --count 300 --sheet docs/images/shapes.png
"""

import argparse
import json
import math
import random
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, FluxPipeline
from PIL import Image

from training.judge import Marks, mark_all
from training.scenes import SIZE_PX, Scene, caption, make_dataset, random_pair, random_single
from training.tokenizer import MAX_TOKENS

_SCENES_SEED = 2026
_BATCH = 20


def easy_scenes(count: int, seed: int = _SCENES_SEED) -> list[Scene]:
    """Scenes of one thing."""
    rng = random.Random(seed)
    return [random_single(rng) for _ in range(count)]


def hard_scenes(count: int, seed: int = _SCENES_SEED) -> list[Scene]:
    """Scenes of two things."""
    rng = random.Random(seed)
    return [random_pair(rng) for _ in range(count)]


def load(folder: Path) -> DiffusionPipeline:
    """The model in `folder`, in float32, without a progress bar."""
    pipe = DiffusionPipeline.from_pretrained(folder, safety_checker=None, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def model_defaults(folder: Path) -> dict[str, Any]:
    """The step count and guidance that the model asks for, as arguments of `generate`."""
    defaults = json.loads((folder / "darkroom.json").read_text())
    return {"steps": defaults["default_step_count"], "guidance": defaults["default_guidance_scale"]}


@torch.no_grad()
def generate(
    pipe: DiffusionPipeline, scenes: Sequence[Scene], *, steps: int, guidance: float, seed: int = 0
) -> np.ndarray:
    """Draws each scene's canonical caption, seeds counted up from `seed`. Returns [N, H, W, 3] uint8."""
    is_flux = isinstance(pipe, FluxPipeline)
    more = {"height": SIZE_PX, "width": SIZE_PX, "max_sequence_length": MAX_TOKENS} if is_flux else {}
    pictures = []
    for start in range(0, len(scenes), _BATCH):
        part = scenes[start : start + _BATCH]
        answer = pipe(
            [caption(scene) for scene in part],
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(seed + start + i) for i in range(len(part))],
            output_type="np",
            **more,
        )
        pictures.append((answer.images * 255).round().astype(np.uint8))
    return np.concatenate(pictures)


def contact_sheet(pictures: np.ndarray, columns: int) -> Image.Image:
    """Pictures [N, H, W, 3] side by side, `columns` in a row; the last row is dropped if it is not full."""
    starts = range(0, len(pictures) - columns + 1, columns)
    return Image.fromarray(np.concatenate([np.concatenate(list(pictures[i : i + columns]), axis=1) for i in starts]))


def interval(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share seen in `count` trials (Wilson 1927, JASA 22)."""
    z = 1.96
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return middle - half, middle + half


def shares(marks: Sequence[Marks]) -> dict[str, float]:
    """The share of pictures that are right, by attribute, and in everything."""
    names = [*(field.name for field in fields(Marks)), "everything"]
    return {name: sum(getattr(m, name) for m in marks) / len(marks) for name in names}


def in_a_line(marks: Sequence[Marks]) -> str:
    """The shares in per cent, for a log."""
    return " ".join(f"{name} {share:.1%}" for name, share in shares(marks).items())


def report(title: str, marks: Sequence[Marks]) -> None:
    """Prints each attribute's share with its interval."""
    print(f"{title} ({len(marks)} pictures)")
    for name, share in shares(marks).items():
        low, high = interval(share, len(marks))
        print(f"  {name:10} {share:6.1%}   95 % interval {low:6.1%} to {high:6.1%}")


def main() -> None:
    """Measures the judge on drawn truth, then the model on easy and on hard prompts."""
    parser = argparse.ArgumentParser(prog="python -m training.evaluate", description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("models/shapes"))
    parser.add_argument("--count", type=int, default=300, help="pictures of each kind")
    parser.add_argument("--steps", type=int, help="default: the model's own")
    parser.add_argument("--guidance", type=float, help="default: the model's own")
    parser.add_argument("--sheet", type=Path, help="write a contact sheet of 30 easy and 30 hard pictures here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    given = {"steps": options.steps, "guidance": options.guidance}
    settings = {**model_defaults(options.model), **{key: value for key, value in given.items() if value is not None}}
    truth = make_dataset(2000, seed=99)
    report("The judge on drawn truth", mark_all(truth.pictures, truth.scenes))
    pipe, shown = load(options.model), []
    for kind, scenes in (("one thing", easy_scenes(options.count)), ("two things", hard_scenes(options.count))):
        pictures = generate(pipe, scenes, **settings)
        told = ", ".join(f"{key} {value:g}" for key, value in settings.items())
        report(f"{options.model}, {told}, {kind}", mark_all(pictures, scenes))
        shown.append(pictures[:30])
    if options.sheet:
        options.sheet.parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(np.concatenate(shown), 10).save(options.sheet)


if __name__ == "__main__":
    main()
