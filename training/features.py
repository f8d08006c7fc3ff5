"""A small network that has learned to read drawn scenes; its features tell how far two sets of pictures are apart.

The distance is Fréchet's (Heusel et al. 2017, arXiv 1706.08500), with these features in Inception's place, which never
saw a flat shape: figures compare with each other, not with those of other papers. Unlike the judge, it counts what no
rule names: soft edges, dirt, wrong shades.

    python -m training.features --limit-s 400 --out models/judge
"""

import argparse
import json
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from training.descent import Descent, Plan
from training.scenes import (
    BACKGROUNDS,
    COLOURS,
    PLACES,
    SHAPES,
    SIZES,
    Scene,
    draw,
    make_dataset,
    random_scene,
    turned,
)
from training.vae import to_image_BCHW

FEATURES = 64
FILE_NAME = "model.safetensors"
_WIDTHS = (16, 32, 48, 64, 64)
_TOLD = ("left of", "above")  # a pair is told from its left or upper thing
BLANK = "nothing"
"""The answer where there is no second thing, or no size to tell."""
QUESTIONS: dict[str, tuple[str, ...]] = {
    "background": tuple(BACKGROUNDS),
    "place": (*PLACES, *_TOLD),
    "size": (*SIZES, BLANK),
    "first colour": tuple(COLOURS),
    "first shape": SHAPES,
    "second colour": (*COLOURS, BLANK),
    "second shape": (*SHAPES, BLANK),
}


def answers(scene: Scene) -> dict[str, str]:
    """What the network should say to each question."""
    told = turned(scene) if scene.is_hard and scene.place not in _TOLD else scene
    first, second = told.things[0], told.things[1] if told.is_hard else None
    return {
        "background": told.background,
        "place": told.place,
        "size": first.size or BLANK,
        "first colour": first.colour,
        "first shape": first.shape,
        "second colour": second.colour if second else BLANK,
        "second shape": second.shape if second else BLANK,
    }


class Reader(nn.Module):
    """Pictures [B, 3, 128, 128] in [-1, 1] to features [B, FEATURES], and from there to the answers."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in zip((3, *_WIDTHS), _WIDTHS, strict=False):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.SiLU()]
            layers += [nn.Conv2d(after, after, 3, padding=1), nn.GroupNorm(8, after), nn.SiLU()]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(_WIDTHS[-1] * 16, FEATURES))
        self.heads = nn.ModuleList([nn.Linear(FEATURES, len(names)) for names in QUESTIONS.values()])

    def features(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        """[B, FEATURES]."""
        features_BD: torch.Tensor = self.body(image_BCHW)
        return features_BD

    def forward(self, image_BCHW: torch.Tensor) -> list[torch.Tensor]:
        """Scores of the answers to each question."""
        features_BD = F.silu(self.features(image_BCHW))
        return [head(features_BD) for head in self.heads]


def train_reader(plan: Plan, *, batch: int = 32, folder: Path | None = None) -> tuple[Reader, list[float]]:
    """Returns the network and the loss of each step. Pictures are blurred and noisy now and then, as models' are."""
    torch.manual_seed(4)
    reader = Reader()
    descent = Descent("reader", {"reader": reader}, plan, seed=4, folder=folder)

    def loss() -> torch.Tensor:
        drawn = [draw(random_scene(descent.rng), descent.rng) for _ in range(batch)]
        image_BCHW = _worn(to_image_BCHW(torch.from_numpy(np.stack([d.picture for d in drawn]))), descent.rng)
        targets = _targets([d.scene for d in drawn])
        scores = reader(image_BCHW)
        return torch.stack([F.cross_entropy(s, t) for s, t in zip(scores, targets, strict=True)]).sum()

    losses = descent.run(loss)
    trained = descent.averaged("reader")
    assert isinstance(trained, Reader)
    return trained.eval(), losses


def _worn(image_BCHW: torch.Tensor, rng: random.Random) -> torch.Tensor:
    if rng.random() < 0.3:
        image_BCHW = F.avg_pool2d(image_BCHW, 3, stride=1, padding=1, count_include_pad=False)
    return image_BCHW + rng.uniform(0, 0.15) * torch.randn_like(image_BCHW)


def _targets(scenes: list[Scene]) -> list[torch.Tensor]:
    told = [answers(scene) for scene in scenes]
    return [torch.tensor([names.index(t[question]) for t in told]) for question, names in QUESTIONS.items()]


@torch.no_grad()
def features_of(reader: Reader, pictures: np.ndarray) -> np.ndarray:
    """Features [N, FEATURES] float64 of pictures [N, H, W, 3] uint8."""
    parts = torch.from_numpy(pictures).split(100)
    return torch.cat([reader.features(to_image_BCHW(part)) for part in parts]).double().numpy()


@torch.no_grad()
def share_read(reader: Reader, pictures: np.ndarray, scenes: list[Scene]) -> float:
    """The share of pictures to which every answer is right."""
    rights = []
    for start in range(0, len(scenes), 100):
        scores = reader(to_image_BCHW(torch.from_numpy(pictures[start : start + 100])))
        targets = _targets(scenes[start : start + 100])
        rights += [torch.stack([s.argmax(1) == t for s, t in zip(scores, targets, strict=True)]).all(0)]
    return float(torch.cat(rights).float().mean())


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Fréchet distance of two normal distributions fitted to features [N, D] and [M, D]."""
    means = [features.mean(0) for features in (first, second)]
    root, spread = (np.cov(features, rowvar=False) for features in (first, second))
    values, vectors = np.linalg.eigh(root)
    half = vectors * np.sqrt(values.clip(0)) @ vectors.T
    shared = np.sqrt(np.linalg.eigvalsh(half @ spread @ half).clip(0)).sum()
    return float(np.square(means[0] - means[1]).sum() + np.trace(root) + np.trace(spread) - 2 * shared)


def load_reader(folder: Path) -> Reader:
    """The network that `main` wrote."""
    reader = Reader()
    reader.load_state_dict({name: tensor.float() for name, tensor in load_file(folder / FILE_NAME).items()})
    return reader.eval()


def main() -> None:
    """Trains the network, says how much of drawn truth it reads, and saves it in half precision."""
    parser = argparse.ArgumentParser(prog="python -m training.features", description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("out/training"), help="where the state of trainings is")
    parser.add_argument("--limit-s", type=float, default=400, help="CPU seconds of the whole training")
    parser.add_argument("--run-s", type=float, default=float("inf"), help="CPU seconds of this run")
    parser.add_argument("--out", type=Path, default=Path("models/judge"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    plan = Plan(peak=2e-3, limit_s=options.limit_s, run_s=options.run_s, fall=0.6, decay=0.995)
    reader, _ = train_reader(plan, folder=options.folder)
    options.out.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.half().contiguous() for name, tensor in reader.state_dict().items()}
    save_file(tensors, options.out / FILE_NAME)
    (options.out / FILE_NAME).chmod(0o644)  # safetensors makes it readable by nobody else
    (options.out / "config.json").write_text(json.dumps({"architectures": [Reader.__name__]}) + "\n")
    truth = make_dataset(2000, seed=99)
    print(f"reads all of {share_read(load_reader(options.out), truth.pictures, truth.scenes):.2%} of drawn pictures")


if __name__ == "__main__":
    main()
