"""Tells in which style a thing is painted, so that a LoRA's effect is a figure.

The scene asked for is drawn in every style where the picture has its thing, and the nearest drawing names the style:
the rules are those of `scenes`, not a second set.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np

from training.scenes import (
    BACKGROUNDS,
    COLOURS,
    SIZE_PX,
    STRIPE_SHADE,
    STYLES,
    Scene,
    Spot,
    draw_at,
    draw_mask,
)

_UNIT_PX = 24.0
_LEAST_AREA_PX = 60
_LEAST_DIFFERENCE = 0.3  # of 255, over the whole picture


def style_of(picture: np.ndarray, asked: Scene) -> str | None:
    """The style of a single thing in a picture [SIZE_PX, SIZE_PX, 3] uint8; None where it is not to be seen."""
    (thing,) = asked.things
    mask = _covered(picture, thing.colour, asked.background)
    if mask.sum() < _LEAST_AREA_PX:
        return None
    left, right, top, bottom = _box(mask)
    unit_left, unit_right, unit_top, unit_bottom = _unit_box(thing.shape)
    scale = (right - left + bottom - top) / (unit_right - unit_left + unit_bottom - unit_top)
    x = (left + right) / 2 - scale * (unit_left + unit_right) / 2
    y = (top + bottom) / 2 - scale * (unit_top + unit_bottom) / 2
    spot = Spot(x, y, scale * _UNIT_PX)
    drawn = {style: draw_at(asked, [spot], style).picture.astype(np.float32) for style in STYLES}
    return min(STYLES, key=lambda style: float(np.abs(drawn[style] - picture).mean()))


def is_visible(scene: Scene, style: str) -> bool:
    """Whether a style shows on a scene: a shadow does not on black."""
    spot = Spot(SIZE_PX / 2, SIZE_PX / 2, _UNIT_PX)
    flat, styled = (draw_at(scene, [spot], kind).picture.astype(np.float32) for kind in ("flat", style))
    return float(np.abs(styled - flat).mean()) > _LEAST_DIFFERENCE


def share_in_style(pictures: np.ndarray, asked: Sequence[Scene], style: str) -> float:
    """The share of pictures [N, H, W, 3] uint8 of single things that are painted in a style."""
    told = [style_of(picture, scene) for picture, scene in zip(pictures, asked, strict=True)]
    return told.count(style) / len(told)


def _covered(picture: np.ndarray, colour: str, background: str) -> np.ndarray:
    """Pixels nearer to the thing's colour, light or dark, than to the background, plain or in shadow."""
    ink, ground = (np.array(c, np.float32) for c in (COLOURS[colour], BACKGROUNDS[background]))
    shades = [ink, STRIPE_SHADE * ink, ground, 0.7 * ground, 0.4 * ground]
    distance = np.stack([np.abs(picture - shade).sum(2) for shade in shades])
    covered: np.ndarray = distance.argmin(0) < 2
    return covered


def _box(mask: np.ndarray) -> tuple[float, float, float, float]:
    """Left, right, top and bottom of what is covered, but for a few stray pixels."""
    ys, xs = np.nonzero(mask)
    left, right = np.quantile(xs, (0.005, 0.995))
    top, bottom = np.quantile(ys, (0.005, 0.995))
    return float(left), float(right), float(top), float(bottom)


@cache
def _unit_box(shape: str) -> tuple[float, float, float, float]:
    """The box of a shape of radius _UNIT_PX, around its own centre."""
    middle = SIZE_PX / 2
    left, right, top, bottom = _box(draw_mask(shape, middle, middle, _UNIT_PX) > 127)
    return left - middle, right - middle, top - middle, bottom - middle
