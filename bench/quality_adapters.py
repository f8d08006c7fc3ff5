"""What the shipped LoRAs and the ControlNet do to the pictures of their models.

A LoRA is worth its name if things are painted in its style, without a word in the prompt: the share that are, without
it and with it. A ControlNet is if the thing is where its picture says, to half of a latent pixel, and of the shape that
was asked for: that share, and the share by chance, of the same pictures against the edges of others.

    python -m bench.quality_adapters --count 300 --sheet docs/images/adapters.png
"""

from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

from bench import report
from darkroom.registry.catalogue import GuideEntry, LoraEntry, read_model_store
from training.controlnet import edges, follow, followed, some_anywhere
from training.evaluate import contact_sheet, easy_scenes, generate, interval, load, model_defaults
from training.styles import is_visible, share_in_style

T = TypeVar("T")
_SHOWN_COUNT = 10


def of_lora(store: Path, entry: LoraEntry, count: int) -> tuple[dict[str, Any], np.ndarray]:
    """The share of pictures in the LoRA's style, without and with it, and some of them. Its id ends with the style."""
    base, style = store / str(entry.base_model), entry.lora_id.rsplit("-", 1)[-1]
    pipe, settings = load(base), model_defaults(base)
    scenes = [scene for scene in easy_scenes(2 * count) if is_visible(scene, style)][:count]
    without = generate(pipe, scenes, **settings)
    pipe.load_lora_weights(store / entry.lora_id)
    with_it = generate(pipe, scenes, **settings)
    shares = {key: share_in_style(pictures, scenes, style) for key, pictures in _pair(without, with_it)}
    return {"name": entry.lora_id, "what": f"painted in {style}", **shares}, _some(without, with_it)


def of_controlnet(store: Path, entry: GuideEntry, count: int) -> tuple[dict[str, Any], np.ndarray]:
    """The share of things that are where the edges are, where the next picture's edges would have them, and some."""
    base, drawings = store / str(entry.base_model), some_anywhere(count)
    parts = {**load(base).components, "controlnet": ControlNetModel.from_pretrained(store / entry.guide_id)}
    pipe = StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    pictures = follow(pipe, drawings, **model_defaults(base))
    share = followed(pictures, drawings)
    what = "shape and place as its picture says"
    row = {"name": entry.guide_id, "what": what, **dict(_pair(share.by_chance, share.share))}
    return row, _some(np.stack([edges(drawing.masks) for drawing in drawings]), pictures)


def _pair(without: T, with_it: T) -> list[tuple[str, T]]:
    return [("without", without), ("with", with_it)]


def _some(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.concatenate([above[:_SHOWN_COUNT], below[:_SHOWN_COUNT]])


def main() -> None:
    """Prints the table."""
    parser = report.command_line("quality_adapters", "What LoRAs and ControlNets do to pictures.")
    parser.add_argument("--count", type=int, default=300, help="pictures of each")
    parser.add_argument("--sheet", type=Path, help="write some pictures of each to this file: two rows an adapter")
    options = parser.parse_args()
    torch.set_num_threads(1)
    on, count = report.machine(), _SHOWN_COUNT if options.quick else options.count
    listing = read_model_store(options.model_store)
    found = [of_lora(options.model_store, entry, count) for entry in listing.loras if entry.base_model]
    found += [of_controlnet(options.model_store, entry, count) for entry in listing.guides if entry.base_model]
    if options.sheet:
        contact_sheet(np.concatenate([some for _, some in found]), _SHOWN_COUNT).save(options.sheet, optimize=True)
    head = ("adapter", "what", "without it", "with it")
    rows = [row for row, _ in found]
    shown = ((row["name"], row["what"], *(_share(row[key], count) for key in ("without", "with"))) for row in rows)
    report.table(f"{count} pictures of one thing each", head, shown)
    report.finish("quality_adapters", on, {"rows": rows, "count": count})


def _share(share: float, count: int) -> str:
    low, high = interval(share, count)
    return f"{share:.1%} ({low:.1%}–{high:.1%})"


if __name__ == "__main__":
    main()
