"""What ships with Darkroom, for tests."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from darkroom.registry.catalogue import LoraEntry

MODELS = Path(__file__).parents[1] / "models"
SHAPES = MODELS / "shapes"


def sampled(loras: Sequence[LoraEntry]) -> list[Any]:
    """All of them, as parameters of a test: one of each base model at once, the others in the long run."""
    first = {lora.base_model: lora for lora in reversed(loras)}
    return [
        pytest.param(lora, id=lora.lora_id, marks=[] if first[lora.base_model] is lora else [pytest.mark.long])
        for lora in loras
    ]
