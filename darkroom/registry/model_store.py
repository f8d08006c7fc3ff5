"""Lists what a model store offers, by JSON, headers and file sizes only, so that router and cachemgr need no torch.

A folder with a model_index.json is a model, one with a config.json of diffusers' a ControlNet, one with an
image_encoder an IP-Adapter; one with none of these, but with a safetensors file, is a LoRA.

The rule: a folder that cannot be served is refused with its reason; it never hides the others.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from darkroom.errors import InvalidField
from darkroom.families import CONTROLNETS, FAMILIES, IP_ADAPTED
from darkroom.registry.model_entry import (
    CONTROLNET,
    IP_ADAPTER,
    ComponentEntry,
    Entry,
    GuideEntry,
    LoraEntry,
    ModelEntry,
)
from darkroom.registry.store_folder import Refused, StoreFolder
from darkroom.schedulers import schedulers_for
from darkroom.wire import fields

_DEFAULT_SIZE_PX = 512
_DEFAULT_VAE_FACTOR = 8
_DEFAULT_STEP_COUNT = 25
_DEFAULT_GUIDANCE_SCALE = 5.0
_MAX_VAE_BLOCKS = 8
_MAX_SIZE_MULTIPLE_PX = 512
_MAX_COMPONENTS = 32
_MAX_OVERRIDE = 1_000_000

_PIPELINE_MULTIPLE_PX = 8
"""Every pipeline insists on it, whatever its VAE's factor."""
_WHOLE_OVERRIDES = frozenset(
    {"default_width_px", "default_height_px", "size_multiple_px", "default_step_count", "max_sequence_length"}
)
_OVERRIDES = _WHOLE_OVERRIDES | {"default_guidance_scale"}

_ENCODER_TENSORS = re.compile(r"(?:text_encoder(?:_[0-9]+)?\.|lora_te[0-9]*_|base_model\.text_encoder)")

_CLASS_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_COMPONENT_NAME = re.compile(r"[a-z0-9][a-z0-9_]{0,63}")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreListing:
    """What a model store offers."""

    models: tuple[ModelEntry, ...]
    """By model_id."""
    loras: tuple[LoraEntry, ...]
    """By lora_id."""
    guides: tuple[GuideEntry, ...]
    """By guide_id."""
    refused: dict[str, str]
    """Folders of any of them that cannot be served, and why."""

    @property
    def entries(self) -> tuple[Entry, ...]:
        """All that is served."""
        return (*self.models, *self.loras, *self.guides)


def read_model_store(root: Path) -> StoreListing:
    """Reads every folder of the store that can be any of them. Raises OSError if the store cannot be listed."""
    models: list[ModelEntry] = []
    adapters: list[LoraEntry | GuideEntry] = []
    refused: dict[str, str] = {}
    for path in sorted(path for path in root.iterdir() if not path.name.startswith(".")):  # those are in the making
        try:
            if path.joinpath("model_index.json").exists():
                models.append(_read_model(root, path))
            elif path.is_dir() and (adapter := _read_adapter(root, path)):
                adapters.append(adapter)
        except (Refused, InvalidField, OSError) as problem:
            refused[os.fsencode(path.name).decode(errors="replace")] = str(problem)
    model_ids = {entry.model_id for entry in models}
    for entry in adapters:
        if entry.base_model is not None and entry.base_model not in model_ids:
            refused[entry.entry_id] = f"its base_model {entry.base_model} cannot be served from this store"
    served = [entry for entry in adapters if entry.entry_id not in refused]
    return StoreListing(
        models=tuple(models),
        loras=tuple(entry for entry in served if isinstance(entry, LoraEntry)),
        guides=tuple(entry for entry in served if isinstance(entry, GuideEntry)),
        refused=refused,
    )


def _read_adapter(root: Path, path: Path) -> LoraEntry | GuideEntry | None:
    """None for a folder that is none of them. Raises Refused, or InvalidField for a name that no request could have."""
    folder = StoreFolder(root, path)
    weights = folder.weights()
    if weights and path.joinpath("image_encoder", "config.json").is_file():
        return _read_ip_adapter(folder, path, weights)
    config = folder.find_object("config.json")
    if config is None:
        return _read_lora(folder, path, weights) if weights else None
    class_name = config.get("_class_name")
    return None if class_name is None else _read_controlnet(folder, path, class_name)


def _read_controlnet(folder: StoreFolder, path: Path, name: object) -> GuideEntry:
    if not isinstance(name, str) or name not in CONTROLNETS:
        raise Refused(f"its config.json names a class that is none of {', '.join(CONTROLNETS)}")
    return GuideEntry(
        guide_id=_check_id(path.name, "controlnet_id"),
        role=CONTROLNET,
        pipelines=CONTROLNETS[name],
        base_model=_read_base_model(_read_adapter_settings(folder, {"base_model"})),
        size_bytes=folder.component_bytes("."),
    )


def _read_ip_adapter(folder: StoreFolder, path: Path, weights: list[str]) -> GuideEntry:
    if len(weights) > 1:
        raise Refused(f"it has {len(weights)} safetensors files: an IP-Adapter has one, and an image_encoder")
    settings = _read_adapter_settings(folder, {"base_model"})
    return GuideEntry(
        guide_id=_check_id(path.name, "ip_adapter_id"),
        role=IP_ADAPTER,
        pipelines=IP_ADAPTED,
        base_model=_read_base_model(settings),
        size_bytes=folder.read_header(weights[0]).size_bytes + folder.component_bytes("image_encoder"),
    )


def _read_adapter_settings(folder: StoreFolder, known: set[str]) -> dict[str, object]:
    settings = folder.find_object("darkroom.json") or {}
    if unknown := settings.keys() - known:
        raise Refused(f"darkroom.json has an unknown key {min(unknown)[:64]!r}")
    return settings


def _read_base_model(settings: Mapping[str, object]) -> str | None:
    base_model = settings.get("base_model")
    if base_model is not None and not isinstance(base_model, str):
        raise Refused("darkroom.json: base_model must be a model_id")
    return None if base_model is None else fields.check_model_id(base_model)


def _read_lora(folder: StoreFolder, path: Path, weights: list[str]) -> LoraEntry:
    lora_id = _check_id(path.name, "lora_id")
    if len(weights) > 1:
        raise Refused(f"it has {len(weights)} safetensors files: a LoRA has one, a model has a model_index.json")
    settings = _read_adapter_settings(folder, {"base_model", "default_scale"})
    scale = settings.get("default_scale", 1.0)
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not abs(scale) <= fields.MAX_LORA_SCALE:
        raise Refused(f"darkroom.json: default_scale must be from -{fields.MAX_LORA_SCALE} to {fields.MAX_LORA_SCALE}")
    header = folder.read_header(weights[0])
    changes_encoder = {_ENCODER_TENSORS.match(name) is not None for name in header.tensors}
    return LoraEntry(
        lora_id=lora_id,
        base_model=_read_base_model(settings),
        default_scale=float(scale),
        stages=("encoder",) * (True in changes_encoder) + ("denoiser",) * (False in changes_encoder),
        size_bytes=header.size_bytes,
    )


def _check_id(value: str, field: str) -> str:
    """Ids of all of them are alike: they are folders of the store. Raises InvalidField naming `field`."""
    try:
        return fields.check_model_id(value)
    except InvalidField as problem:
        raise InvalidField(field, problem.facts["problem"]) from problem


def _read_model(root: Path, path: Path) -> ModelEntry:
    """Raises Refused, or InvalidField for a name or a default that no request could have."""
    model_id = fields.check_model_id(path.name)
    folder = StoreFolder(root, path)
    index = folder.read_object("model_index.json")
    pipeline = index.get("_class_name")
    if not isinstance(pipeline, str) or not _CLASS_NAME.fullmatch(pipeline):
        raise Refused("model_index.json has no _class_name that is a class name")
    names = _component_names(index)
    defaults = _read_defaults(folder, names)
    if "max_sequence_length" in defaults:  # the encoder reads it for itself
        fields.check_count("max_sequence_length", int(defaults["max_sequence_length"]), fields.MAX_SEQUENCE_LENGTH)
    width_px, height_px = int(defaults["default_width_px"]), int(defaults["default_height_px"])
    fields.check_size(width_px, height_px, int(defaults["size_multiple_px"]))
    return ModelEntry(
        model_id=model_id,
        pipeline=pipeline,
        components=tuple(ComponentEntry(name=name, size_bytes=folder.component_bytes(name)) for name in names),
        schedulers=_read_schedulers(folder, names),
        default_width_px=width_px,
        default_height_px=height_px,
        size_multiple_px=int(defaults["size_multiple_px"]),
        default_step_count=fields.check_count(
            "default_step_count", int(defaults["default_step_count"]), fields.MAX_STEPS
        ),
        default_guidance_scale=fields.check_guidance_scale(float(defaults["default_guidance_scale"])),
        guided_above=_guided_above(pipeline),
    )


def _guided_above(pipeline: str) -> float | None:
    family = FAMILIES.get(pipeline)
    if family is None:
        return 1.0
    return family.unguided_scale if family.classifier_free else None


def _component_names(index: Mapping[str, object]) -> list[str]:
    """The entries of the form `name: [library, class]`; one that is [null, null] is absent."""
    names = []
    for name, value in index.items():
        match value:
            case [str(), str()] if not name.startswith("_"):
                if not _COMPONENT_NAME.fullmatch(name):
                    raise Refused(f"component {name[:64]!r} is not a name of a-z 0-9 _")
                names.append(name)
    if not 1 <= len(names) <= _MAX_COMPONENTS:
        raise Refused(f"model_index.json names {len(names)} components, not 1 to {_MAX_COMPONENTS}")
    return names


def _read_defaults(folder: StoreFolder, names: list[str]) -> dict[str, float]:
    """Every default: what the configs say, or else is usual, under what darkroom.json says."""
    overrides = _read_overrides(folder)
    factor = _read_vae_factor(folder, names)
    denoiser = next((name for name in ("unet", "transformer") if name in names), None)
    multiple_px = int(
        overrides.get(
            "size_multiple_px", max(_PIPELINE_MULTIPLE_PX, 2 * factor if denoiser == "transformer" else factor)
        )
    )
    if not 1 <= multiple_px <= _MAX_SIZE_MULTIPLE_PX:
        raise Refused(f"size_multiple_px must be 1 to {_MAX_SIZE_MULTIPLE_PX}, not {multiple_px}")
    width_px, height_px = _read_size(folder, denoiser, factor)
    return {
        "default_width_px": _fit(width_px, multiple_px),
        "default_height_px": _fit(height_px, multiple_px),
        "size_multiple_px": multiple_px,
        "default_step_count": _DEFAULT_STEP_COUNT,
        "default_guidance_scale": _DEFAULT_GUIDANCE_SCALE,
        **overrides,
    }


def _read_overrides(folder: StoreFolder) -> dict[str, float]:
    """What darkroom.json sets. Ranges are checked where the values are used."""
    found = folder.find_object("darkroom.json") or {}
    overrides: dict[str, float] = {}
    for name, value in found.items():
        if name not in _OVERRIDES:
            raise Refused(f"darkroom.json has an unknown key {name[:64]!r}")
        if isinstance(value, bool) or not isinstance(value, int if name in _WHOLE_OVERRIDES else int | float):
            raise Refused(f"darkroom.json: {name} must be a number, not {str(value)[:64]}")
        if abs(value) > _MAX_OVERRIDE:
            raise Refused(f"darkroom.json: {name} is out of range")
        overrides[name] = value
    return overrides


def _read_vae_factor(folder: StoreFolder, names: list[str]) -> int:
    """How many pixels wide one latent cell is."""
    config = folder.find_object("vae/config.json") if "vae" in names else None
    blocks = (config or {}).get("block_out_channels")
    if isinstance(blocks, list) and 1 <= len(blocks) <= _MAX_VAE_BLOCKS:
        return 1 << (len(blocks) - 1)
    return _DEFAULT_VAE_FACTOR


def _read_size(folder: StoreFolder, denoiser: str | None, factor: int) -> tuple[int, int]:
    """Width and height the denoiser was trained for, in pixels."""
    config = folder.find_object(f"{denoiser}/config.json") if denoiser else None
    match (config or {}).get("sample_size"):
        case int(side) if _is_latent_size(side):
            return side * factor, side * factor
        case [int(height), int(width)] if _is_latent_size(height) and _is_latent_size(width):
            return width * factor, height * factor
        case _:
            return _DEFAULT_SIZE_PX, _DEFAULT_SIZE_PX


def _is_latent_size(value: int) -> bool:
    return not isinstance(value, bool) and 1 <= value <= fields.MAX_SIZE_PX


def _fit(size_px: int, multiple_px: int) -> int:
    """The nearest size that a request may have, downwards if there is one."""
    least_px = -(-fields.MIN_SIZE_PX // multiple_px) * multiple_px
    return max(least_px, min(size_px, fields.MAX_SIZE_PX) // multiple_px * multiple_px)


def _read_schedulers(folder: StoreFolder, names: list[str]) -> tuple[str, ...]:
    config = folder.find_object("scheduler/scheduler_config.json") if "scheduler" in names else None
    class_name = (config or {}).get("_class_name")
    return schedulers_for(class_name) if isinstance(class_name, str) else ()
