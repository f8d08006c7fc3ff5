"""How good the pictures of the shipped models are: read back by the judge, and their distance from drawn truth.

Every model draws the same prompts, half of them of one thing (easy), half of two (hard). Two rows need no model: drawn
pictures themselves, and what the VAE makes of them, which no model over that VAE can beat.

    python -m bench.quality --models shapes shapes@2:1 shapes-turbo shapes-dit --count 1000 --sheets docs/images
"""

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import report
from training.evaluate import (
    contact_sheet,
    easy_scenes,
    generate,
    hard_scenes,
    interval,
    load,
    model_defaults,
    shares,
)
from training.features import Reader, features_of, frechet_distance, load_reader
from training.judge import Marks, mark_all
from training.scenes import Scene, draw_all
from training.vae import reconstruct

_TRUTH_SEED, _DRAWN_SEED = 500, 501
_TIMED_COUNT = 9
_SHOWN_COUNT, _SHOWN_COLUMNS = 30, 10
"""Pictures of each kind on a contact sheet."""


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
    return {"count": len(marks), **{name: (share, *interval(share, len(marks))) for name, share in told.items()}}


def seconds_per_picture(draw: Callable[[int], object]) -> float:
    """Median seconds of drawing one picture alone, after one that does not count."""
    times = []
    for seed in range(_TIMED_COUNT + 1):
        start_s = time.perf_counter()
        draw(seed)
        times.append(time.perf_counter() - start_s)
    return statistics.median(times[1:])


def of_model(
    store: Path, wanted: str, pictures: Pictures, scenes: Sequence[Scene], sheets: Path | None
) -> dict[str, Any]:
    """The row of a model as it asks to be run, or of `NAME@STEPS:GUIDANCE`; the contact sheet of the former."""
    name, _, given = wanted.partition("@")
    pipe, settings = load(store / name), model_defaults(store / name)
    if given:
        steps, _, guidance = given.partition(":")
        settings = {"steps": int(steps), "guidance": float(guidance)}
    drawn = generate(pipe, scenes, **settings)
    if sheets and not given:
        half = len(drawn) // 2
        shown = np.concatenate([drawn[:half][:_SHOWN_COUNT], drawn[half:][:_SHOWN_COUNT]])
        contact_sheet(shown, _SHOWN_COLUMNS).save(sheets / f"{name}.png", optimize=True)
    alone_s = seconds_per_picture(lambda seed: generate(pipe, scenes[:1], seed=seed, **settings))
    return {**pictures.measure(wanted, drawn), **settings, "alone_s": alone_s}


def main() -> None:
    """Prints the tables."""
    parser = report.command_line("quality", "Accuracy and distance from drawn truth, per model.")
    parser.add_argument("--models", nargs="+", default=["shapes"], help="folders of the store, or NAME@STEPS:GUIDANCE")
    parser.add_argument("--count", type=int, default=1000, help="pictures per model")
    parser.add_argument("--sheets", type=Path, help="write a contact sheet of each model into this folder")
    options = parser.parse_args()
    torch.set_num_threads(1)
    on, count = report.machine(), 40 if options.quick else options.count
    scenes = [*easy_scenes(count // 2), *hard_scenes(count // 2)]
    truth = draw_all([*easy_scenes(count, _TRUTH_SEED), *hard_scenes(count, _TRUTH_SEED)], _TRUTH_SEED)
    pictures = Pictures(scenes, load_reader(options.model_store / "judge"), truth)
    drawn = draw_all(scenes, _DRAWN_SEED)
    vae = load(options.model_store / options.models[0].partition("@")[0]).vae
    rows = [
        pictures.measure("drawn", drawn),
        pictures.measure("drawn, through the VAE", reconstruct(vae, torch.from_numpy(drawn)).numpy()),
        *(of_model(options.model_store, wanted, pictures, scenes, options.sheets) for wanted in options.models),
    ]
    title = f"{count} pictures a model, half of them of one thing (easy), one thread"
    report.table(title, ("model", "steps, guidance", "s per picture", "easy", "hard", "distance"), map(_summary, rows))
    names = [name for name in rows[0]["easy"] if name not in ("count", "everything")]
    report.table(
        "right, by attribute",
        ("model", *names),
        (_by_attribute(row, kind, names) for row in rows for kind in ("easy", "hard")),
    )
    report.finish("quality", on, {"rows": rows, "count": count})


def _summary(row: dict[str, Any]) -> list[str]:
    timed = [f"{row['steps']}, {row['guidance']:g}", f"{row['alone_s']:.3f}"] if "steps" in row else ["", ""]
    told = [_share(row[kind]["everything"]) for kind in ("easy", "hard")]
    return [row["name"], *timed, *told, f"{row['distance']:.2f}"]


def _by_attribute(row: dict[str, Any], kind: str, names: Sequence[str]) -> list[str]:
    return [f"{row['name']}, {kind}", *(_share(row[kind][name]) for name in names)]


def _share(told: tuple[float, float, float]) -> str:
    share, low, high = told
    return f"{share:.1%} ({low:.1%}–{high:.1%})"


if __name__ == "__main__":
    main()
