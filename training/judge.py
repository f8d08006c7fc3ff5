"""Reads a scene back off a picture by pixel rules: no training, no knowledge of the model that drew it.

Its own error on drawn truth is measured first (`python -m training.evaluate`), so that a model's figure can be trusted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy import ndimage

from training.scenes import (
    BACKGROUNDS,
    COLOURS,
    PLACES,
    SHAPES,
    SIZE_PX,
    SIZES,
    Scene,
    Thing,
    draw_mask,
    turned,
)

_LEAST_CONTRAST = 60  # sum over red, green and blue by which a thing differs from the background
_LEAST_AREA_PX = 150  # a quarter of the smallest thing drawn; less is dirt
_LEAST_OVERLAP = 0.7  # with the best template, or it is no shape at all
_EDGE = 0.45  # share of the way from background to a thing's colour at which a pixel counts as the thing
_WINDOW_PX = 80  # holds the largest thing
_RADII_PX = np.arange(16.0, 34.0)


@dataclass(frozen=True, slots=True)
class Form:
    """A thing as read, with the middle of its bounding box and its radius in px."""

    colour: str
    shape: str
    x: float
    y: float
    radius: float


def find(picture: np.ndarray) -> list[Form | None]:
    """Whatever stands out from the background of a picture [SIZE_PX, SIZE_PX, 3] uint8; None for what is no shape."""
    pixels = picture.astype(np.float32)
    ground = _ground(pixels)
    return [_form(pixels, ground, part) for part in _parts(np.abs(pixels - ground).sum(2))]


def read(picture: np.ndarray) -> Scene | None:
    """Reads the scene off a picture [SIZE_PX, SIZE_PX, 3] uint8; None unless one or two shapes stand out, alone."""
    forms = find(picture)
    found = [form for form in forms if form]
    if len(found) < len(forms) or not 1 <= len(found) <= 2:
        return None
    place = _place(found[0]) if len(found) == 1 else _relation(*found)
    things = tuple(_thing(form, alone=len(found) == 1) for form in found)
    return Scene(things=things, place=place, background=read_background(picture))


def read_background(picture: np.ndarray) -> str:
    """The background's name, whatever stands on it."""
    return _nearest(_ground(picture.astype(np.float32)), BACKGROUNDS)


def _ground(pixels: np.ndarray) -> np.ndarray:
    """The colour of the picture's frame, two pixels wide."""
    sides = (pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:])
    colour: np.ndarray = np.median(np.concatenate([side.reshape(-1, 3) for side in sides]), axis=0)
    return colour


def _parts(distance: np.ndarray) -> list[np.ndarray]:
    """Connected parts that differ from the background: masks [SIZE_PX, SIZE_PX]."""
    labels, count = ndimage.label(distance > _LEAST_CONTRAST, np.ones((3, 3)))
    parts = [labels == label for label in range(1, count + 1)]
    return [part for part in parts if part.sum() >= _LEAST_AREA_PX]


def _form(pixels: np.ndarray, ground: np.ndarray, part: np.ndarray) -> Form | None:
    distance = np.abs(pixels - ground).sum(2) * part
    core = np.quantile(distance[part], 0.75)
    mask = distance > _EDGE * core
    colour = np.median(pixels[distance > 0.8 * core], axis=0)
    ys, xs = np.nonzero(mask)
    y, x = (ys.min() + ys.max()) / 2, (xs.min() + xs.max()) / 2
    window = _window(mask, round(x), round(y))
    kinds, templates, areas = _templates()
    shared = templates @ window.ravel().astype(np.float32)
    overlap = shared / (areas + window.sum() - shared)
    best = int(overlap.argmax())
    if overlap[best] < _LEAST_OVERLAP:
        return None
    shape, radius = kinds[best]
    return Form(_nearest(colour, COLOURS), shape, x, y, radius)


def _window(mask: np.ndarray, x: int, y: int) -> np.ndarray:
    """The part of the mask around (x, y)."""
    half = _WINDOW_PX // 2
    return np.pad(mask, half)[y : y + _WINDOW_PX, x : x + _WINDOW_PX]


@cache
def _templates() -> tuple[list[tuple[str, float]], np.ndarray, np.ndarray]:
    """Every shape at every radius: (shape, radius), masks [N, window] and their areas [N]."""
    kinds = [(shape, float(radius)) for shape in SHAPES for radius in _RADII_PX]
    masks = []
    for shape, radius in kinds:
        mask = draw_mask(shape, SIZE_PX / 2, SIZE_PX / 2, radius) > _EDGE * 255
        ys, xs = np.nonzero(mask)
        masks.append(_window(mask, round((xs.min() + xs.max()) / 2), round((ys.min() + ys.max()) / 2)).ravel())
    stacked = np.stack(masks).astype(np.float32)
    return kinds, stacked, stacked.sum(1)


def _nearest(colour: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> str:
    return min(palette, key=lambda name: float(np.abs(colour - np.array(palette[name])).sum()))


def _place(form: Form) -> str:
    return min(PLACES, key=lambda name: float(np.hypot(form.x - PLACES[name][0], form.y - PLACES[name][1])))


def _relation(first: Form, second: Form) -> str:
    right, down = second.x - first.x, second.y - first.y
    if abs(right) > abs(down):
        return "left of" if right > 0 else "right of"
    return "above" if down > 0 else "below"


def _thing(form: Form, *, alone: bool) -> Thing:
    size = min(SIZES, key=lambda name: abs(SIZES[name] - form.radius)) if alone else None
    return Thing(colour=form.colour, shape=form.shape, size=size)


@dataclass(frozen=True, slots=True)
class Marks:
    """What is right about one picture."""

    count: bool
    """As many things as asked for; if not, only the background can be right besides."""
    colour: bool
    shape: bool
    size: bool
    place: bool
    """Or the relation, of two things."""
    background: bool

    @property
    def everything(self) -> bool:
        """Whether nothing is wrong."""
        return all((self.count, self.colour, self.shape, self.size, self.place, self.background))


def mark(picture: np.ndarray, asked: Scene) -> Marks:
    """Compares what is read off a picture with what was asked for.

    Two things are taken in the order that agrees best, so that things swapped count against their place alone.
    """
    seen = read(picture)
    if seen is None or len(seen.things) != len(asked.things):
        wrong = dict.fromkeys(("count", "colour", "shape", "size", "place"), False)
        return Marks(**wrong, background=read_background(picture) == asked.background)
    told = [_compare(seen, asked)]
    if seen.is_hard:
        told.append(_compare(turned(seen), asked))
    return max(told, key=lambda marks: (marks.colour + marks.shape, marks.place))


def mark_all(pictures: np.ndarray, asked: Sequence[Scene]) -> list[Marks]:
    """`mark` of each of `pictures` [N, SIZE_PX, SIZE_PX, 3] uint8."""
    return [mark(picture, scene) for picture, scene in zip(pictures, asked, strict=True)]


def _compare(seen: Scene, asked: Scene) -> Marks:
    pairs = list(zip(seen.things, asked.things, strict=True))
    return Marks(
        count=True,
        colour=all(a.colour == b.colour for a, b in pairs),
        shape=all(a.shape == b.shape for a, b in pairs),
        size=all(a.size == b.size for a, b in pairs),
        place=seen.place == asked.place,
        background=seen.background == asked.background,
    )
