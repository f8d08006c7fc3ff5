"""How good the pictures of the shipped models are: read back by the judge, and their distance from drawn truth.

Every model draws the same prompts, half of them of one thing (easy), half of two (hard). Two rows need no model: drawn
pictures themselves, and what the VAE makes of them, which no model over that VAE can beat.

    python -m bench.quality --models shapes shapes-turbo --count 1000
"""

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import report
from training.evaluate import easy_scenes, generate, hard_scenes, interval, load, model_defaults, shares
from training.features import Reader, features_of, frechet_distance, load_reader
from training.judge import Marks, mark_all
from training.scenes import Scene, draw_all
from training.vae import reconstruct

_TRUTH_SEED, _DRAWN_SEED = 500, 501
_TIMED_COUNT = 9


class Pictures:
    """Figures of one row: what the judge reads, and how far the features are from truth's."""

    def __init__(self, scenes: Sequence[Scene], reader: Reader, truth: np.ndarray) -> None:
        self._scenes, self._reader, self._truth = scenes, reader, features_of(reader, truth)

    def measure(self, name: str, pictures: np.ndarray) -> dict[str, Any]:
        """The row of pictures [N, H, W, 3] uint8, one of each scene."""
        marks = mark_all(pictures, self._scenes)
        easy = [m for m, scene in zip(marks, self._scenes, strict=True) if not scene.is_hard]
        hard = [m for m, scene in zip(marks, self._scenes, strict=True) if scene.is_hard]
        return {
            "name": name,
            "easy": _told(easy),
            "hard": _told(hard),
            "distance": frechet_distance(features_of(self._reader, pictures), self._truth),
        }


def _told(marks: Sequence[Marks]) -> dict[str, Any]:
    told = shares(marks)
    return {**told, "count": len(marks), "interval": interval(told["everything"], len(marks))}


def seconds_per_picture(draw: Callable[[int], object]) -> float:
    """Median seconds of drawing one picture alone, after one that does not count."""
    times = []
    for seed in range(_TIMED_COUNT + 1):
        start_s = time.perf_counter()
        draw(seed)
        times.append(time.perf_counter() - start_s)
    return statistics.median(times[1:])


def of_model(folder: Path, pictures: Pictures, scenes: Sequence[Scene]) -> dict[str, Any]:
    """The row of one model, at its own number of steps and guidance."""
    pipe, settings = load(folder), model_defaults(folder)
    drawn = generate(pipe, scenes, **settings)
    alone_s = seconds_per_picture(lambda seed: generate(pipe, scenes[:1], seed=seed, **settings))
    return {**pictures.measure(folder.name, drawn), **settings, "alone_s": alone_s}


def main() -> None:
    """Prints the table."""
    parser = report.command_line("quality", "Accuracy and distance from drawn truth, per model.")
    parser.add_argument("--models", nargs="+", default=["shapes"], help="folders of the store")
    parser.add_argument("--count", type=int, default=1000, help="pictures per model")
    options = parser.parse_args()
    torch.set_num_threads(1)
    on, count = report.machine(), 40 if options.quick else options.count
    scenes = [*easy_scenes(count // 2), *hard_scenes(count // 2)]
    truth = draw_all([*easy_scenes(count, _TRUTH_SEED), *hard_scenes(count, _TRUTH_SEED)], _TRUTH_SEED)
    pictures = Pictures(scenes, load_reader(options.model_store / "judge"), truth)
    drawn = draw_all(scenes, _DRAWN_SEED)
    vae = load(options.model_store / options.models[0]).vae
    rows = [
        pictures.measure("drawn", drawn),
        pictures.measure("drawn, through the VAE", reconstruct(vae, torch.from_numpy(drawn)).numpy()),
        *(of_model(options.model_store / name, pictures, scenes) for name in options.models),
    ]
    head = ("model", "steps", "s per picture", "easy, all right", "hard, all right", "distance")
    report.table(f"{count} pictures a model, one thread", head, map(_shown, rows))
    report.finish("quality", on, {"rows": rows, "count": count})


def _shown(row: dict[str, Any]) -> list[str]:
    return [
        row["name"],
        str(row.get("steps", "")),
        f"{row['alone_s']:.3f}" if "alone_s" in row else "",
        _share(row["easy"]),
        _share(row["hard"]),
        f"{row['distance']:.2f}",
    ]


def _share(told: dict[str, Any]) -> str:
    low, high = told["interval"]
    return f"{told['everything']:.1%} ({low:.1%}–{high:.1%})"


if __name__ == "__main__":
    main()
