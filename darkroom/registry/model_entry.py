"""What the cluster knows about a model, LoRA or guide without loading it: all that requests are checked by. Pure."""

import json
from dataclasses import asdict, dataclass
from typing import Any, Self, TypeAlias

from darkroom.registry.json_fields import finite, finite_or_none, items, text, whole

CONTROLNET, IP_ADAPTER = "controlnet", "ip_adapter"
"""What a guide can be."""
_LORA, _GUIDE = "lora", "guide"


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
    guided_above: float | None = 1.0
    """The guidance scale up to which there is no guidance, and no negative is encoded; None: never any."""

    @property
    def entry_id(self) -> str:
        """The name of its folder."""
        return self.model_id

    def is_guided(self, guidance_scale: float) -> bool:
        """Whether the denoiser needs the negative's embedding at this scale."""
        return self.guided_above is not None and guidance_scale > self.guided_above

    def to_json(self) -> bytes:
        """The entry as the registry keeps it: equal entries give equal bytes."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, value: bytes) -> Self:
        """Raises ValueError for what is no entry. Fields of later versions are passed over."""
        try:
            fields = json.loads(value)
            return cls(
                model_id=text(fields["model_id"]),
                pipeline=text(fields["pipeline"]),
                components=tuple(_component(component) for component in items(fields["components"])),
                schedulers=tuple(text(name) for name in items(fields["schedulers"])),
                default_width_px=whole(fields["default_width_px"]),
                default_height_px=whole(fields["default_height_px"]),
                size_multiple_px=whole(fields["size_multiple_px"]),
                default_step_count=whole(fields["default_step_count"]),
                default_guidance_scale=finite(fields["default_guidance_scale"]),
                guided_above=finite_or_none(fields.get("guided_above", 1.0)),
            )
        except (KeyError, TypeError, RecursionError, OverflowError) as error:
            raise ValueError(f"not a model entry: {error!r}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraEntry:
    """One LoRA of the catalogue. Its id is a folder of the same store, so no model has it too."""

    lora_id: str
    base_model: str | None
    """The model it is for; None if the store does not say: loading it tells."""
    default_scale: float
    stages: tuple[str, ...]
    """The stages whose networks it changes, as far as the names of its tensors say."""
    size_bytes: int
    """Of its file."""

    @property
    def entry_id(self) -> str:
        """The name of its folder."""
        return self.lora_id

    def to_json(self) -> bytes:
        """The entry as the registry keeps it: equal entries give equal bytes."""
        return json.dumps({**asdict(self), "kind": _LORA}, sort_keys=True, separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, value: bytes) -> Self:
        """Raises ValueError for what is no entry. Fields of later versions are passed over."""
        try:
            fields = json.loads(value)
            base_model = fields["base_model"]
            return cls(
                lora_id=text(fields["lora_id"]),
                base_model=None if base_model is None else text(base_model),
                default_scale=finite(fields["default_scale"]),
                stages=tuple(text(stage) for stage in items(fields["stages"])),
                size_bytes=whole(fields["size_bytes"]),
            )
        except (KeyError, TypeError, RecursionError, OverflowError) as error:
            raise ValueError(f"not a LoRA entry: {error!r}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class GuideEntry:
    """One ControlNet or IP-Adapter of the catalogue: what leads models by pictures."""

    guide_id: str
    role: str
    """CONTROLNET or IP_ADAPTER."""
    pipelines: tuple[str, ...]
    """Pipeline classes of the models it can lead."""
    base_model: str | None
    """The model it is for; None if the store does not say: loading it tells."""
    size_bytes: int
    """Of all its files."""

    @property
    def entry_id(self) -> str:
        """The name of its folder."""
        return self.guide_id

    def to_json(self) -> bytes:
        """The entry as the registry keeps it: equal entries give equal bytes."""
        return json.dumps({**asdict(self), "kind": _GUIDE}, sort_keys=True, separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, value: bytes) -> Self:
        """Raises ValueError for what is no entry. Fields of later versions are passed over."""
        try:
            fields = json.loads(value)
            base_model = fields["base_model"]
            return cls(
                guide_id=text(fields["guide_id"]),
                role=text(fields["role"]),
                pipelines=tuple(text(name) for name in items(fields["pipelines"])),
                base_model=None if base_model is None else text(base_model),
                size_bytes=whole(fields["size_bytes"]),
            )
        except (KeyError, TypeError, RecursionError, OverflowError) as error:
            raise ValueError(f"not a ControlNet's or IP-Adapter's entry: {error!r}") from error


Entry: TypeAlias = ModelEntry | LoraEntry | GuideEntry


def parse_entry(value: bytes) -> Entry:
    """An entry of any kind. Raises ValueError for what is none."""
    try:
        kind = json.loads(value).get("kind")
    except (AttributeError, RecursionError) as error:
        raise ValueError(f"not an entry: {error!r}") from error
    if kind == _GUIDE:
        return GuideEntry.from_json(value)
    return LoraEntry.from_json(value) if kind == _LORA else ModelEntry.from_json(value)


def _component(value: Any) -> ComponentEntry:
    return ComponentEntry(name=text(value["name"]), size_bytes=whole(value["size_bytes"]))
