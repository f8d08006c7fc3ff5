"""What the shipped LoRAs and the ControlNet do to the pictures of their models.

A LoRA is worth its name if things are painted in its style, without a word in the prompt: the share that are, without
it and with it. A ControlNet is if the thing is where its picture says, to half of a latent pixel, and of the shape that
was asked for: that share, and the share by chance, of the same pictures against the edges of others.

    python -m bench.quality_adapters --count 300
"""

from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

from bench import report
from darkroom.registry.catalogue import GuideEntry, LoraEntry, read_model_store
from training.controlnet import follow
from training.evaluate import easy_scenes, generate, interval, load, model_defaults
from training.styles import share_in_style


def of_lora(store: Path, entry: LoraEntry, count: int) -> dict[str, Any]:
    """The share of pictures in the LoRA's style, without and with it. Its id ends with the style's name."""
    base, style = store / str(entry.base_model), entry.lora_id.rsplit("-", 1)[-1]
    pipe, scenes, settings = load(base), easy_scenes(count), model_defaults(base)
    without = share_in_style(generate(pipe, scenes, **settings), scenes, style)
    pipe.load_lora_weights(store / entry.lora_id)
    with_it = share_in_style(generate(pipe, scenes, **settings), scenes, style)
    return {"name": entry.lora_id, "what": f"painted in {style}", "without": without, "with": with_it}


def of_controlnet(store: Path, entry: GuideEntry, count: int) -> dict[str, Any]:
    """The share of things that are where the edges are, and where edges of the next picture would have them."""
    base = store / str(entry.base_model)
    parts = {**load(base).components, "controlnet": ControlNetModel.from_pretrained(store / entry.guide_id)}
    pipe = StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    followed = follow(pipe, count, **model_defaults(base))
    what = "shape and place as its picture says"
    return {"name": entry.guide_id, "what": what, "without": followed.by_chance, "with": followed.share}


def main() -> None:
    """Prints the table."""
    parser = report.command_line("quality_adapters", "What LoRAs and ControlNets do to pictures.")
    parser.add_argument("--count", type=int, default=300, help="pictures of each")
    options = parser.parse_args()
    torch.set_num_threads(1)
    on, count = report.machine(), 10 if options.quick else options.count
    listing = read_model_store(options.model_store)
    rows = [of_lora(options.model_store, entry, count) for entry in listing.loras if entry.base_model]
    rows += [of_controlnet(options.model_store, entry, count) for entry in listing.guides if entry.base_model]
    head = ("adapter", "what", "without it", "with it")
    shown = ((row["name"], row["what"], *(_share(row[key], count) for key in ("without", "with"))) for row in rows)
    report.table(f"{count} pictures of one thing each", head, shown)
    report.finish("quality_adapters", on, {"rows": rows, "count": count})


def _share(share: float, count: int) -> str:
    low, high = interval(share, count)
    return f"{share:.1%} ({low:.1%}–{high:.1%})"


if __name__ == "__main__":
    main()
