"""Trains `scorer`, the discriminator of a cascade: how sure one may be that a picture is as good as a drawn one.

DiffServe (Ahmad et al. 2025, arXiv 2411.15381): an EfficientNet learns to tell real pictures from those of the light
and the heavy model; a light picture it takes for real is good enough, any other goes to the heavy model. Real ones are
drawn and sent through the VAE, or it would only learn what a VAE looks like. It does not know the prompt.

    python -m training.scorer --light models/shapes-turbo --heavy models/shapes --out models/scorer
"""

import argparse
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import EfficientNetConfig, EfficientNetForImageClassification, EfficientNetImageProcessorPil

from training.descent import Descent, Plan
from training.evaluate import generate, load, model_defaults
from training.saving import save_network
from training.scenes import SIZE_PX, draw_all, random_scenes
from training.vae import reconstruct, to_image_BCHW

REAL = 1
_LABELS = {0: "generated", REAL: "real"}
_SCENES_SEED = 30_000
_SEEN_PX = 64  # half of a picture's side: what is wrong with one shows, and a step takes a fifth of the time


def make_scorer() -> EfficientNetForImageClassification:
    """An untrained classifier, a third as wide and deep as EfficientNet-B0."""
    return EfficientNetForImageClassification(
        EfficientNetConfig(
            image_size=_SEEN_PX,
            width_coefficient=0.35,
            depth_coefficient=0.35,
            hidden_dim=448,
            initializer_range=0.15,  # at the default of 0.02 so narrow a network starts dead
            dropout_rate=0.1,
            id2label=_LABELS,
            label2id={name: label for label, name in _LABELS.items()},
        )
    )


def make_processor() -> EfficientNetImageProcessorPil:
    """What turns a picture into the classifier's input, as `seen` does."""
    half, size = [0.5, 0.5, 0.5], {"height": _SEEN_PX, "width": _SEEN_PX}
    return EfficientNetImageProcessorPil(
        size=size, resample=Image.Resampling.BOX, image_mean=half, image_std=half, include_top=False
    )


def seen(pictures: torch.Tensor) -> torch.Tensor:
    """Pictures [B, H, W, 3] uint8 as the classifier takes them: [B, 3, 64, 64] in [-1, 1]."""
    return F.avg_pool2d(to_image_BCHW(pictures), SIZE_PX // _SEEN_PX).contiguous()


class ScorerTraining:
    """The classifier in training, on as many real as generated pictures."""

    def __init__(self, real: np.ndarray, generated: np.ndarray, plan: Plan, *, folder: Path | None = None) -> None:
        """Both [N, H, W, 3] uint8."""
        torch.manual_seed(13)
        self._kinds = [torch.from_numpy(generated), torch.from_numpy(real)]
        self._scorer = make_scorer().train()
        self.descent = Descent("scorer", {"scorer": self._scorer}, plan, seed=13, folder=folder)

    @property
    def averaged(self) -> EfficientNetForImageClassification:
        """The average of the classifier: what is shipped."""
        return self.descent.averaged("scorer")

    def loss(self, batch: int) -> torch.Tensor:
        """Cross-entropy; half of the batch is real."""
        image_BCHW = torch.cat([_some(kind, batch // 2, self.descent.rng) for kind in self._kinds])
        labels_B = torch.arange(2).repeat_interleave(batch // 2)
        return F.cross_entropy(self._scorer(image_BCHW).logits, labels_B, label_smoothing=0.05)

    def run(self, *, batch: int = 32) -> list[float]:
        """Trains until the plan ends. Returns the loss of each step."""
        return self.descent.run(lambda: self.loss(batch))


def _some(pictures: torch.Tensor, count: int, rng: random.Random) -> torch.Tensor:
    return seen(pictures[[rng.randrange(len(pictures)) for _ in range(count)]])


@torch.no_grad()
def confidence(scorer: EfficientNetForImageClassification, pictures: np.ndarray) -> np.ndarray:
    """How sure it is that each of `pictures` [N, H, W, 3] uint8 is real: [N], 0 to 1."""
    parts = [scorer(seen(part)).logits.softmax(1)[:, REAL] for part in torch.from_numpy(pictures).split(50)]
    scores: np.ndarray = torch.cat(parts).numpy()
    return scores


def generated_pictures(model: Path, count: int, kept: Path) -> np.ndarray:
    """Pictures of random scenes by a model at its own settings: [N, H, W, 3] uint8. Drawn once, then kept in a file."""
    if not kept.exists():
        pipe, defaults = load(model), model_defaults(model)
        pictures = generate(pipe, random_scenes(count, _SCENES_SEED), seed=_SCENES_SEED, **defaults)
        np.save(kept, pictures)
    drawn: np.ndarray = np.load(kept)
    return drawn[:count]


def main() -> None:
    """Trains the classifier and saves it in half precision, its processor beside it."""
    parser = argparse.ArgumentParser(prog="python -m training.scorer", description=__doc__)
    parser.add_argument("--light", type=Path, default=Path("models/shapes-turbo"))
    parser.add_argument("--heavy", type=Path, default=Path("models/shapes"))
    parser.add_argument("--folder", type=Path, default=Path("out/training"), help="where the state of trainings is")
    parser.add_argument("--count", type=int, default=1500, help="pictures of each model")
    parser.add_argument("--limit-s", type=float, default=900, help="CPU seconds of the whole training")
    parser.add_argument("--run-s", type=float, default=float("inf"), help="CPU seconds of this run")
    parser.add_argument("--out", type=Path, default=Path("models/scorer"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    models = (options.light, options.heavy)
    generated = [generated_pictures(m, options.count, options.folder / f"pictures-{m.name}.npy") for m in models]
    drawn = draw_all(random_scenes(2 * options.count, _SCENES_SEED + 1), _SCENES_SEED)
    real = reconstruct(load(options.heavy).vae, torch.from_numpy(drawn)).numpy()
    plan = Plan(peak=1e-3, limit_s=options.limit_s, run_s=options.run_s, fall=0.7, decay=0.99)
    training = ScorerTraining(real, np.concatenate(generated), plan, folder=options.folder)
    training.run()
    save_network(training.averaged, options.out)
    make_processor().save_pretrained(options.out)


if __name__ == "__main__":
    main()
