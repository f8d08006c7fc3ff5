"""Where the models are that ship with Darkroom."""

from pathlib import Path

MODELS = Path(__file__).parents[1] / "models"
SHAPES = MODELS / "shapes"
