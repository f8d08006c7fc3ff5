"""Reads a scene back off a picture by pixel rules: no training, no knowledge of the model that drew it.

Its own error on drawn truth is measured first (`python -m training.evaluate`), so that a model's figure can be trusted.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np

from training.scenes import BACKGROUNDS, COLOURS, PLACES, SHAPES, SIZE_PX, SIZES, Scene, draw_mask

_MARGIN = 0.45  # share of the way from background to shape colour at which a pixel counts as shape


def _nearest(colour: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> str:
    return min(palette, key=lambda name: float(np.abs(colour - np.array(palette[name])).sum()))


def _centred(mask: np.ndarray) -> np.ndarray:
    """The mask moved so that its bounding box is centred, as well as whole pixels allow."""
    ys, xs = np.nonzero(mask)
    dy, dx = (SIZE_PX - ys.min() - ys.max()) // 2, (SIZE_PX - xs.min() - xs.max()) // 2
    return np.roll(mask, (dy, dx), (0, 1))


@cache
def _templates() -> tuple[tuple[str, str, np.ndarray], ...]:
    """(shape, size, mask) over a few radii of each size."""
    made = []
    for shape in SHAPES:
        for size, radius in SIZES.items():
            for scale in (0.88, 0.94, 1.0, 1.06, 1.12):
                scene = Scene(size=size, colour="red", shape=shape, place="in the center", background="white")
                made.append((shape, size, _centred(draw_mask(scene, SIZE_PX / 2, SIZE_PX / 2, radius * scale) > 127)))
    return tuple(made)


def read(picture: np.ndarray) -> Scene | None:
    """Reads the scene off a picture [SIZE_PX, SIZE_PX, 3] uint8; None when no shape stands out."""
    pixels = picture.astype(np.float32)
    frame = np.concatenate(
        [
            pixels[:2].reshape(-1, 3),
            pixels[-2:].reshape(-1, 3),
            pixels[:, :2].reshape(-1, 3),
            pixels[:, -2:].reshape(-1, 3),
        ]
    )
    ground = np.median(frame, axis=0)
    distance = np.abs(pixels - ground).sum(2)
    core = np.quantile(distance, 0.985)
    if core < 60:
        return None
    mask = distance > _MARGIN * core
    colour = np.median(pixels[distance > 0.8 * core], axis=0)
    ys, xs = np.nonzero(mask)
    centre = np.array([(xs.min() + xs.max()) / 2, (ys.min() + ys.max()) / 2])
    place = min(PLACES, key=lambda name: float(np.linalg.norm(centre - np.array(PLACES[name]))))
    moved = _centred(mask)
    overlap = [((moved & t).sum() / (moved | t).sum(), shape, size) for shape, size, t in _templates()]
    _, shape, size = max(overlap)
    return Scene(
        size=size, colour=_nearest(colour, COLOURS), shape=shape, place=place, background=_nearest(ground, BACKGROUNDS)
    )


@dataclass(frozen=True, slots=True)
class Score:
    """Share of pictures on which each attribute was read as asked for; `all_four` leaves size out."""

    colour: float
    shape: float
    place: float
    background: float
    size: float
    all_four: float
    count: int


def score(pictures: np.ndarray, asked: list[Scene]) -> Score:
    """Compares what is read off `pictures` [N, H, W, 3] uint8 with what was asked for."""
    seen = [read(picture) for picture in pictures]
    names = ("colour", "shape", "place", "background", "size")
    right = np.array(
        [[s is not None and getattr(s, n) == getattr(a, n) for n in names] for s, a in zip(seen, asked, strict=True)]
    )
    shares = dict(zip(names, right.mean(0).tolist(), strict=True))
    return Score(**shares, all_four=float(right[:, :4].all(1).mean()), count=len(asked))
