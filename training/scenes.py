"""The world that the shipped models draw: one or two flat shapes on a plain background, and captions that say so.

Every picture is drawn by PIL from a `Scene`, so the truth behind a caption is known exactly. A scene of one thing names
its size and its place (the easy case); one of two names how they stand to each other (the hard one), and both have
the same size, which nobody says.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIZE_PX = 128
_SUPERSAMPLING = 4

COLOURS = {
    "red": (220, 30, 30),
    "orange": (255, 140, 0),
    "yellow": (250, 225, 30),
    "green": (20, 150, 50),
    "cyan": (40, 210, 225),
    "blue": (30, 60, 220),
    "purple": (130, 40, 170),
    "pink": (250, 120, 190),
}
BACKGROUNDS = {"white": (250, 250, 250), "gray": (128, 128, 128), "black": (10, 10, 10), "beige": (232, 214, 176)}
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "ring")
PLACES = {
    "at the left": (36, 64),
    "at the right": (92, 64),
    "at the top": (64, 36),
    "at the bottom": (64, 92),
    "in the center": (64, 64),
}
SIZES = {"small": 19.0, "large": 30.0}
"""Radius of a thing that stands alone, in px."""
PAIR_RADIUS_PX = 21.0
"""Radius of each of two things."""
RELATIONS = {
    "left of": ((35, 64), (93, 64)),
    "right of": ((93, 64), (35, 64)),
    "above": ((64, 35), (64, 93)),
    "below": ((64, 93), (64, 35)),
}
"""Where the first and the second of two things are."""
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
STYLES = ("flat", "outline", "stripes", "shadow")
"""How things are painted: flat by the models themselves, the others by their LoRAs."""
_JITTER_PX = 3.0
_LINE_PX = 5
_STRIPE_PX = 8
STRIPE_SHADE = 0.55
_SHADOW_PX = 6
_SHADOW = 0.6
_PAIR_SHARE = 0.6  # of random scenes: there is more to learn from two things than from one


@dataclass(frozen=True, slots=True, kw_only=True)
class Thing:
    """A flat shape in one colour."""

    colour: str
    shape: str
    size: str | None = None
    """None where it stands beside another: both are then of one size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """What one picture shows, in the words of its caption."""

    things: tuple[Thing, ...]
    """One or two. Two differ in colour or shape, or their relation would mean nothing."""
    place: str
    """Where one thing is, of PLACES; how the first of two stands to the second, of RELATIONS."""
    background: str

    @property
    def is_hard(self) -> bool:
        """Whether there are two things, whose colours and shapes a model may mix up."""
        return len(self.things) == 2


@dataclass(frozen=True, slots=True)
class Drawing:
    """A picture of a scene, and the truth behind it."""

    scene: Scene
    picture: np.ndarray
    """[SIZE_PX, SIZE_PX, 3] uint8."""
    masks: np.ndarray
    """[2, SIZE_PX, SIZE_PX] uint8: coverage by each thing, in the scene's order, 0 to 255; all 0 for none."""


def single(size: str, colour: str, shape: str, place: str, background: str) -> Scene:
    """The scene of one thing."""
    return Scene(things=(Thing(colour=colour, shape=shape, size=size),), place=place, background=background)


def random_single(rng: random.Random) -> Scene:
    """A scene of one thing, each attribute drawn uniformly and independently."""
    return single(
        size=rng.choice(list(SIZES)),
        colour=rng.choice(list(COLOURS)),
        shape=rng.choice(SHAPES),
        place=rng.choice(list(PLACES)),
        background=rng.choice(list(BACKGROUNDS)),
    )


def random_pair(rng: random.Random) -> Scene:
    """A scene of two different things, each attribute drawn uniformly and independently."""
    kinds = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    first, second = (Thing(colour=colour, shape=shape) for colour, shape in rng.sample(kinds, 2))
    return Scene(things=(first, second), place=rng.choice(list(RELATIONS)), background=rng.choice(list(BACKGROUNDS)))


def random_scene(rng: random.Random) -> Scene:
    """A scene of one thing or of two."""
    return random_pair(rng) if rng.random() < _PAIR_SHARE else random_single(rng)


def turned(scene: Scene) -> Scene:
    """The same scene of two things told from the other one: a left of b is b right of a."""
    return Scene(things=scene.things[::-1], place=OPPOSITE[scene.place], background=scene.background)


def caption(scene: Scene) -> str:
    """The canonical caption: every attribute, in a fixed order."""
    things = [_name(thing) for thing in scene.things]
    if len(things) == 2:
        return f"{things[0]} {scene.place} {things[1]} on a {scene.background} background"
    return f"{things[0]} {scene.place} on a {scene.background} background"


def _name(thing: Thing) -> str:
    """With its article: no word of the language begins with a vowel but orange."""
    words = [word for word in (thing.size, thing.colour, thing.shape) if word]
    return f"{'an' if words[0] == 'orange' else 'a'} {' '.join(words)}"


def loose_caption(scene: Scene, rng: random.Random) -> str:
    """A caption as people write it: now and then an attribute is left out, or the parts come in another order."""
    parts = [_loose_pair(scene, rng)] if scene.is_hard else _loose_single(scene, rng)
    if rng.random() > 0.05:
        parts.append(f"on a {scene.background} background")
    if rng.random() < 0.2:
        rng.shuffle(parts)
    text = " ".join(parts)
    if rng.random() < 0.1:
        text = " ".join(word for word in text.split() if word not in ("a", "an"))
    return text


def _loose_single(scene: Scene, rng: random.Random) -> list[str]:
    (thing,) = scene.things
    size = thing.size if rng.random() > 0.1 else None
    parts = [_name(Thing(colour=thing.colour, shape=thing.shape, size=size))]
    if rng.random() > 0.05:
        parts.append(scene.place)
    return parts


def _loose_pair(scene: Scene, rng: random.Random) -> str:
    told = turned(scene) if rng.random() < 0.5 else scene
    first, second = (_name(thing) for thing in told.things)
    if rng.random() < 0.05:
        return f"{first} and {second}"
    to_the = "to the " if told.place.endswith("of") and rng.random() < 0.2 else ""
    return f"{first} {to_the}{told.place} {second}"


def _outline(shape: str, x: float, y: float, r: float) -> list[tuple[float, float]]:
    """Corners of a polygon shape of radius `r` px around (x, y)."""
    if shape == "square":
        a = 0.86 * r
        return [(x - a, y - a), (x + a, y - a), (x + a, y + a), (x - a, y + a)]
    if shape == "triangle":
        return [(x, y - r), (x + r, y + 0.8 * r), (x - r, y + 0.8 * r)]
    if shape == "diamond":
        return [(x, y - 1.1 * r), (x + 0.75 * r, y), (x, y + 1.1 * r), (x - 0.75 * r, y)]
    if shape == "cross":
        a = 0.36 * r
        quarter = [(a, r), (a, a), (r, a)]
        right = quarter + [(dx, -dy) for dx, dy in reversed(quarter)]
        corners = right + [(-dx, dy) for dx, dy in reversed(right)]
        return [(x + dx, y + dy) for dx, dy in corners]
    radii = [1.15 * r if i % 2 == 0 else 0.5 * r for i in range(10)]
    return [(x + q * math.sin(i * math.pi / 5), y - q * math.cos(i * math.pi / 5)) for i, q in enumerate(radii)]


def draw_mask(shape: str, x: float, y: float, r: float, line_px: int = 0) -> np.ndarray:
    """Coverage of each pixel by a shape of radius `r` px around (x, y): [SIZE_PX, SIZE_PX] uint8, antialiased.

    With `line_px` only its outline, that wide, is drawn.
    """
    s = _SUPERSAMPLING
    left, top = (max(0, math.floor(c - 1.2 * r) - 1) for c in (x, y))
    right, bottom = (min(SIZE_PX, math.ceil(c + 1.2 * r) + 1) for c in (x, y))
    canvas = Image.new("L", ((right - left) * s, (bottom - top) * s), 0)
    pen = ImageDraw.Draw(canvas)
    cx, cy, radius = (x - left) * s, (y - top) * s, r * s
    ink = {"fill": 0, "outline": 255, "width": line_px * s} if line_px else {"fill": 255}
    if shape in ("circle", "ring"):
        pen.ellipse([cx - radius, cy - radius, cx + radius, cy + radius], **ink)
        if shape == "ring":
            hole = 0.55 * radius
            pen.ellipse([cx - hole, cy - hole, cx + hole, cy + hole], **{**ink, "fill": 0})
    else:
        pen.polygon(_outline(shape, cx, cy, radius), **ink)
    mask = np.zeros((SIZE_PX, SIZE_PX), np.uint8)
    mask[top:bottom, left:right] = np.asarray(canvas.reduce(s))
    return mask


@dataclass(frozen=True, slots=True)
class Spot:
    """Where a thing is, in px."""

    x: float
    y: float
    radius: float


def draw(
    scene: Scene, rng: random.Random, style: str = "flat", *, centre: tuple[float, float] | None = None
) -> Drawing:
    """Draws the scene in one of STYLES, with a little jitter of places and sizes.

    With `centre` a single thing is drawn around it, wherever its caption says that it is.
    """
    centres = RELATIONS[scene.place] if scene.is_hard else (centre or PLACES[scene.place],)
    spots = []
    for thing, (x, y) in zip(scene.things, centres, strict=True):
        radius = (SIZES[thing.size] if thing.size else PAIR_RADIUS_PX) * rng.uniform(0.94, 1.06)
        jitter_x, jitter_y = (rng.uniform(-_JITTER_PX, _JITTER_PX) for _ in range(2))
        spots.append(Spot(x + jitter_x, y + jitter_y, radius))
    return draw_at(scene, spots, style)


def draw_at(scene: Scene, spots: Sequence[Spot], style: str = "flat") -> Drawing:
    """Draws each of the scene's things at its spot."""
    masks = np.zeros((2, SIZE_PX, SIZE_PX), np.uint8)
    picture = np.empty((SIZE_PX, SIZE_PX, 3), np.float32)
    picture[:] = BACKGROUNDS[scene.background]
    line_px = _LINE_PX if style == "outline" else 0
    for mask, thing, spot in zip(masks, scene.things, spots, strict=False):
        mask[:] = draw_mask(thing.shape, spot.x, spot.y, spot.radius, line_px)
        _paint(picture, mask, np.array(COLOURS[thing.colour], np.float32), style)
    return Drawing(scene, picture.round().astype(np.uint8), masks)


def _paint(picture: np.ndarray, mask: np.ndarray, colour: np.ndarray, style: str) -> None:
    """Lays a thing of this coverage on the picture."""
    if style == "shadow":
        picture *= 1 - _SHADOW * _shadow(mask)
    ink = _striped(colour) if style == "stripes" else colour
    picture += mask[..., None].astype(np.float32) / 255 * (ink - picture)


def _shadow(mask: np.ndarray) -> np.ndarray:
    """How far a soft shadow, to the lower right, covers each pixel: [SIZE_PX, SIZE_PX, 1], 0 to 1."""
    moved = np.zeros_like(mask)
    moved[_SHADOW_PX:, _SHADOW_PX:] = mask[:-_SHADOW_PX, :-_SHADOW_PX]
    blurred = Image.fromarray(moved).filter(ImageFilter.GaussianBlur(_SHADOW_PX / 2))
    return np.asarray(blurred, np.float32)[..., None] / 255


def _striped(colour: np.ndarray) -> np.ndarray:
    """The colour, in rows that are plain and rows that are darker: [SIZE_PX, 1, 3]."""
    is_dark = np.arange(SIZE_PX) // _STRIPE_PX % 2 == 1
    return np.where(is_dark[:, None, None], STRIPE_SHADE * colour, colour)


@dataclass(frozen=True, slots=True)
class Dataset:
    """Drawn scenes: `pictures` [N, H, W, 3] uint8, `masks` [N, 2, H, W] uint8, and the truth behind each."""

    scenes: list[Scene]
    pictures: np.ndarray
    masks: np.ndarray


def random_scenes(count: int, seed: int) -> list[Scene]:
    """The scenes of `make_dataset`, not drawn."""
    rng = random.Random(seed)
    return [random_scene(rng) for _ in range(count)]


def make_dataset(count: int, seed: int) -> Dataset:
    """Draws `count` random scenes; equal seeds give equal data."""
    scenes, rng = random_scenes(count, seed), random.Random(f"drawing {seed}")
    drawn = [draw(scene, rng) for scene in scenes]
    return Dataset(scenes, np.stack([d.picture for d in drawn]), np.stack([d.masks for d in drawn]))


def draw_all(scenes: Sequence[Scene], seed: int, style: str = "flat") -> np.ndarray:
    """Pictures of the scenes: [N, H, W, 3] uint8."""
    rng = random.Random(f"drawing {seed}")
    return np.stack([draw(scene, rng, style).picture for scene in scenes])
