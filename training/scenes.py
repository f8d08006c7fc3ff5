"""The world that the shipped models draw: one flat shape on a plain background, with a caption that says all of it.

Every picture is drawn by PIL from a `Scene`, so the truth behind a caption is known exactly.
"""

import math
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SIZE_PX = 64
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
    "at the left": (18, 32),
    "at the right": (46, 32),
    "at the top": (32, 18),
    "at the bottom": (32, 46),
    "in the center": (32, 32),
}
SIZES = {"small": 9.5, "large": 15.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """What one picture shows, in the words of its caption."""

    size: str
    colour: str
    shape: str
    place: str
    background: str


def random_scene(rng: random.Random) -> Scene:
    """Draws each attribute uniformly and independently."""
    return Scene(
        size=rng.choice(list(SIZES)),
        colour=rng.choice(list(COLOURS)),
        shape=rng.choice(SHAPES),
        place=rng.choice(list(PLACES)),
        background=rng.choice(list(BACKGROUNDS)),
    )


def caption(scene: Scene) -> str:
    """The canonical caption: every attribute, in a fixed order."""
    return f"a {scene.size} {scene.colour} {scene.shape} {scene.place} on a {scene.background} background"


def loose_caption(scene: Scene, rng: random.Random) -> str:
    """A caption as people write it: now and then an attribute is left out, or the parts come in another order."""
    size = "" if rng.random() < 0.1 else f"{scene.size} "
    parts = [f"a {size}{scene.colour} {scene.shape}"]
    if rng.random() > 0.05:
        parts.append(scene.place)
    if rng.random() > 0.05:
        parts.append(f"on a {scene.background} background")
    if rng.random() < 0.25:
        rng.shuffle(parts)
    return " ".join(parts)


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
        corners = [
            (-a, -r),
            (a, -r),
            (a, -a),
            (r, -a),
            (r, a),
            (a, a),
            (a, r),
            (-a, r),
            (-a, a),
            (-r, a),
            (-r, -a),
            (-a, -a),
        ]
        return [(x + dx, y + dy) for dx, dy in corners]
    radii = [1.15 * r if i % 2 == 0 else 0.5 * r for i in range(10)]
    return [(x + q * math.sin(i * math.pi / 5), y - q * math.cos(i * math.pi / 5)) for i, q in enumerate(radii)]


def draw_mask(scene: Scene, x: float, y: float, r: float) -> np.ndarray:
    """Coverage of each pixel by the shape: [SIZE_PX, SIZE_PX] uint8, 0 to 255, antialiased."""
    s = _SUPERSAMPLING
    canvas = Image.new("L", (SIZE_PX * s, SIZE_PX * s), 0)
    pen = ImageDraw.Draw(canvas)
    if scene.shape in ("circle", "ring"):
        pen.ellipse([(x - r) * s, (y - r) * s, (x + r) * s, (y + r) * s], fill=255)
        if scene.shape == "ring":
            q = 0.55 * r
            pen.ellipse([(x - q) * s, (y - q) * s, (x + q) * s, (y + q) * s], fill=0)
    else:
        pen.polygon([(px * s, py * s) for px, py in _outline(scene.shape, x, y, r)], fill=255)
    return np.asarray(canvas.resize((SIZE_PX, SIZE_PX), Image.Resampling.BOX))


def draw(scene: Scene, rng: random.Random) -> tuple[np.ndarray, np.ndarray]:
    """Draws the scene with a little jitter of place and size.

    Returns the picture [SIZE_PX, SIZE_PX, 3] uint8 and the shape's coverage [SIZE_PX, SIZE_PX] uint8.
    """
    x, y = PLACES[scene.place]
    r = SIZES[scene.size] * rng.uniform(0.94, 1.06)
    mask = draw_mask(scene, x + rng.uniform(-1.5, 1.5), y + rng.uniform(-1.5, 1.5), r)
    alpha = mask[..., None].astype(np.float32) / 255
    picture = alpha * np.array(COLOURS[scene.colour]) + (1 - alpha) * np.array(BACKGROUNDS[scene.background])
    return picture.round().astype(np.uint8), mask


@dataclass(frozen=True, slots=True)
class Dataset:
    """Drawn scenes: `pictures` [N, H, W, 3] uint8, `masks` [N, H, W] uint8, and the truth behind each."""

    scenes: list[Scene]
    pictures: np.ndarray
    masks: np.ndarray


def make_dataset(count: int, seed: int) -> Dataset:
    """Draws `count` random scenes; equal seeds give equal data."""
    rng = random.Random(seed)
    scenes = [random_scene(rng) for _ in range(count)]
    drawn = [draw(scene, rng) for scene in scenes]
    return Dataset(scenes, np.stack([p for p, _ in drawn]), np.stack([m for _, m in drawn]))
