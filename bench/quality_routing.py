"""What the scorer is worth as a router between a light and a heavy model, as in DiffServe (arXiv 2411.15381).

Both models draw every prompt. For each share of answers that stay light, four ways to choose which: those the scorer
is surest of, any, the shortest prompts, and (as the bound) those the judge finds right. Equal shares cost the same:
every way pays for all light pictures and for the heavy ones it asks for.

    python -m bench.quality_routing --light shapes-turbo --heavy shapes --count 1000
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import EfficientNetForImageClassification

from bench import report
from training.evaluate import easy_scenes, generate, hard_scenes, interval, load, model_defaults
from training.features import features_of, frechet_distance, load_reader
from training.judge import mark_all
from training.scenes import Scene, caption, draw_all
from training.scorer import confidence

_SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_TRUTH_SEED = 500
_SHUFFLE_COUNT = 20  # random routings, over which figures are averaged


@dataclass(frozen=True, slots=True)
class Side:
    """One model's pictures: which are right, and their features."""

    right: np.ndarray
    """[N] bool."""
    features: np.ndarray
    """[N, D]."""


def stays_light(worth: np.ndarray, share: float) -> np.ndarray:
    """Which answers stay light when that share of them does, those of most worth first: [N] bool."""
    order = np.argsort(-worth, kind="stable")
    chosen = np.zeros(len(worth), bool)
    chosen[order[: round(share * len(worth))]] = True
    return chosen


def mixed(light: Side, heavy: Side, is_light: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Accuracy and distance from truth of the answers of a routing."""
    features = np.where(is_light[:, None], light.features, heavy.features)
    accuracy = float(np.where(is_light, light.right, heavy.right).mean())
    return {"accuracy": accuracy, "distance": frechet_distance(features, truth)}


def worths(scenes: Sequence[Scene], scores: np.ndarray, light: Side) -> dict[str, list[np.ndarray]]:
    """By way of routing, how much each prompt deserves a light answer; several draws where chance decides."""
    rng = random.Random(0)
    count = len(scenes)
    by_chance = [np.array([rng.random() for _ in range(count)]) for _ in range(_SHUFFLE_COUNT)]
    length = np.array([len(caption(scene)) for scene in scenes], float)
    return {"scorer": [scores], "random": by_chance, "prompt length": [-length], "judge": [light.right.astype(float)]}


def rows(light: Side, heavy: Side, ways: Mapping[str, list[np.ndarray]], truth: np.ndarray) -> list[dict[str, Any]]:
    """One row per share; a way that draws lots is averaged over them."""
    made = []
    for share in _SHARES:
        row: dict[str, Any] = {"light_share": share}
        for way, drawn in ways.items():
            figures = [mixed(light, heavy, stays_light(worth, share), truth) for worth in drawn]
            row[way] = {name: float(np.mean([f[name] for f in figures])) for name in figures[0]}
        made.append(row)
    return made


def main() -> None:
    """Prints the table."""
    parser = report.command_line("quality_routing", "Scorer-routed answers against other ways to route.")
    parser.add_argument("--light", default="shapes-turbo")
    parser.add_argument("--heavy", default="shapes")
    parser.add_argument("--count", type=int, default=1000, help="prompts, half of them of two things")
    options = parser.parse_args()
    torch.set_num_threads(1)
    on, count, store = report.machine(), 40 if options.quick else options.count, options.model_store
    scenes = [*easy_scenes(count // 2), *hard_scenes(count // 2)]
    reader = load_reader(store / "judge")
    drawn = draw_all([*easy_scenes(count, _TRUTH_SEED), *hard_scenes(count, _TRUTH_SEED)], _TRUTH_SEED)
    pictures = {
        name: generate(load(store / name), scenes, **model_defaults(store / name))
        for name in (options.light, options.heavy)
    }
    light, heavy = (
        Side(np.array([m.everything for m in mark_all(p, scenes)]), features_of(reader, p)) for p in pictures.values()
    )
    scorer = EfficientNetForImageClassification.from_pretrained(store / "scorer", dtype=torch.float32).eval()
    ways = worths(scenes, confidence(scorer, pictures[options.light]), light)
    figures = rows(light, heavy, ways, features_of(reader, drawn))
    head = ("light answers", *(f"{way}, right" for way in ways), *(f"{way}, distance" for way in ways))
    shown = (
        [
            f"{row['light_share']:.0%}",
            *(f"{row[way]['accuracy']:.1%}" for way in ways),
            *(f"{row[way]['distance']:.2f}" for way in ways),
        ]
        for row in figures
    )
    low, high = interval(figures[0]["scorer"]["accuracy"], count)
    report.table(f"{count} prompts; all heavy: {low:.1%} to {high:.1%} right", head, shown)
    report.finish("quality_routing", on, {"rows": figures, "count": count})


if __name__ == "__main__":
    main()
