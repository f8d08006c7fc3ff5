"""What the cluster knows about a model without loading it: all that a request is checked against. Pure."""

import json
import math
from dataclasses import asdict, dataclass
from typing import Any, Self


@dataclass(frozen=True, slots=True, kw_only=True)
class ComponentEntry:
    """One component of a pipeline, such as its unet."""

    name: str
    size_bytes: int
    """Of all its files together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelEntry:
    """One model of the catalogue."""

    model_id: str
    pipeline: str
    """The diffusers class."""
    components: tuple[ComponentEntry, ...]
    """In the order of model_index.json."""
    schedulers: tuple[str, ...]
    """Names a request may choose from, the model's own first; empty if only its own can be used."""
    default_width_px: int
    default_height_px: int
    size_multiple_px: int
    """Widths and heights are multiples of it."""
    default_step_count: int
    default_guidance_scale: float

    def to_json(self) -> bytes:
        """The entry as the registry keeps it: equal entries give equal bytes."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, value: bytes) -> Self:
        """Raises ValueError for what is no entry. Fields of later versions are passed over."""
        try:
            fields = json.loads(value)
            return cls(
                model_id=_text(fields["model_id"]),
                pipeline=_text(fields["pipeline"]),
                components=tuple(_component(component) for component in _items(fields["components"])),
                schedulers=tuple(_text(name) for name in _items(fields["schedulers"])),
                default_width_px=_whole(fields["default_width_px"]),
                default_height_px=_whole(fields["default_height_px"]),
                size_multiple_px=_whole(fields["size_multiple_px"]),
                default_step_count=_whole(fields["default_step_count"]),
                default_guidance_scale=_finite(fields["default_guidance_scale"]),
            )
        except (KeyError, TypeError, RecursionError, OverflowError) as error:
            raise ValueError(f"not a model entry: {error!r}") from error


def _component(value: Any) -> ComponentEntry:
    return ComponentEntry(name=_text(value["name"]), size_bytes=_whole(value["size_bytes"]))


def _items(value: object) -> list[object]:
    if not isinstance(value, list):
        raise TypeError(f"expected a list, not {type(value).__name__}")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected text, not {type(value).__name__}")
    return value


def _whole(value: object) -> int:
    if type(value) is not int or value < 0:
        raise TypeError(f"expected a whole number from 0 on, not {value!r}")
    return value


def _finite(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TypeError(f"expected a finite number, not {value!r}")
    return float(value)
