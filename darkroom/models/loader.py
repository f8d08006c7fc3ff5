"""Builds a pipeline with only a stage's networks present; the others come from their configs, on the meta device.

A model's files are not trusted: only classes of diffusers and transformers, only safetensors, no code from the folder.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from transformers import PreTrainedModel

from darkroom.errors import UnusableModel
from darkroom.models.families import FAMILIES, Family
from darkroom.models.standins import Absent, Batched

diffusers.utils.logging.set_verbosity_error()
transformers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()  # a bar is no log line
transformers.utils.logging.disable_progress_bar()

_LIBRARIES = {"diffusers": diffusers, "transformers": transformers}
_CONDITIONING = ("text_encoder", "tokenizer", "image_encoder", "feature_extractor")
_VAE_METHODS = ("encode", "decode")
_MAX_INDEX_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class NetworkState:
    """How much of a network this process holds."""

    name: str
    resident_bytes: int
    parameter_count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A stage's part of a model: the pipeline, its networks replaced by stand-ins."""

    model_id: str
    family: Family
    pipeline: DiffusionPipeline
    networks: Mapping[str, torch.nn.Module]
    """Every network by name, as loaded: real, or on the meta device."""
    device: torch.device
    load_s: float

    def network_states(self) -> list[NetworkState]:
        """What is resident, network by network, counted from the parameters themselves."""
        return [_state(name, network) for name, network in sorted(self.networks.items())]

    @property
    def denoiser_config(self) -> Mapping[str, Any]:
        """The denoiser's config, whether it is here or not."""
        config: Mapping[str, Any] = getattr(self.pipeline, self.family.denoiser).config
        return config


def load_part(root: Path, model_id: str, stage: str, device: torch.device) -> Part:
    """Loads the part of a model that `stage` (encoder, denoiser or vae) runs. Raises UnusableModel."""
    start_s = time.monotonic()
    folder = root / model_id
    if not folder.resolve().is_relative_to(root.resolve()):
        raise UnusableModel(model_id, "its folder lies outside the model store")
    index = _read_index(folder, model_id)
    family = FAMILIES.get(str(index.get("_class_name")))
    if family is None:
        raise UnusableModel(model_id, "its pipeline class is not supported")
    try:
        pipeline, networks = _assemble(folder, index, family, stage=stage, device=device)
    except (
        OSError,
        ValueError,
        TypeError,
        KeyError,
        RuntimeError,
        AttributeError,
    ) as error:  # what a bad folder makes the loaders raise
        raise UnusableModel(model_id, f"loading its {stage} part failed ({type(error).__name__})") from error
    return Part(
        model_id=model_id,
        family=family,
        pipeline=pipeline,
        networks=networks,
        device=device,
        load_s=time.monotonic() - start_s,
    )


def _read_index(folder: Path, model_id: str) -> dict[str, Any]:
    try:
        text = (folder / "model_index.json").read_text()[: _MAX_INDEX_BYTES + 1]
        index = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise UnusableModel(model_id, "its model_index.json cannot be read") from error
    if not isinstance(index, dict):
        raise UnusableModel(model_id, "its model_index.json is no object")
    return index


def _assemble(
    folder: Path, index: dict[str, Any], family: Family, *, stage: str, device: torch.device
) -> tuple[DiffusionPipeline, dict[str, torch.nn.Module]]:
    components: dict[str, Any] = {}
    networks: dict[str, torch.nn.Module] = {}
    for name, entry in index.items():
        if not isinstance(entry, list):
            if not name.startswith("_"):
                components[name] = entry
            continue
        if entry[0] is None:
            components[name] = None
            continue
        kind = _component_class(folder.name, name, *entry)
        if issubclass(kind, ModelMixin | PreTrainedModel):
            is_here = _stage_of(name, family) == stage
            networks[name] = (
                _load_network(kind, folder / name, device) if is_here else _meta_network(kind, folder / name)
            )
            components[name] = _stand_in(name, networks[name], family, device, is_here=is_here)
        elif issubclass(kind, SchedulerMixin) or stage == "encoder":
            components[name] = kind.from_pretrained(folder / name, local_files_only=True)
        else:
            components[name] = None
    pipeline = getattr(diffusers, family.pipeline)(**components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, networks


def _stage_of(name: str, family: Family) -> str:
    if name == family.denoiser:
        return "denoiser"
    return "encoder" if name.startswith(_CONDITIONING) else "vae"


def _component_class(model_id: str, name: str, library: str, class_name: str) -> Any:
    kind = getattr(_LIBRARIES.get(library), class_name, None)
    if not isinstance(kind, type):
        raise UnusableModel(model_id, f"its component {name} is no class of diffusers or transformers")
    return kind


def _load_network(kind: Any, folder: Path, device: torch.device) -> torch.nn.Module:
    dtype = torch.float32 if device.type == "cpu" else "auto"
    network = kind.from_pretrained(folder, dtype=dtype, use_safetensors=True, local_files_only=True)
    network = network.to(device).eval().requires_grad_(requires_grad=False)
    assert isinstance(network, torch.nn.Module)
    return network


def _meta_network(kind: Any, folder: Path) -> torch.nn.Module:
    with torch.device("meta"):
        if issubclass(kind, PreTrainedModel):
            network = kind(kind.config_class.from_pretrained(folder, local_files_only=True))
        else:
            network = kind.from_config(kind.load_config(folder, local_files_only=True))
    assert isinstance(network, torch.nn.Module)
    return network


def _stand_in(
    name: str, network: torch.nn.Module, family: Family, device: torch.device, *, is_here: bool
) -> torch.nn.Module:
    if not is_here:
        dtype = next((p.dtype for p in network.parameters()), torch.float32)
        return Absent(network, device=device, dtype=dtype)
    if name == family.denoiser:
        return Batched(network, name, shared=family.shared)
    methods = (
        tuple(method for method in _VAE_METHODS if hasattr(network, method)) if isinstance(network, ModelMixin) else ()
    )
    return Batched(network, name, methods=("forward", *methods))


def _state(name: str, network: torch.nn.Module) -> NetworkState:
    held = [p for p in network.parameters() if p.device.type != "meta"]
    buffers = [b for b in network.buffers() if b.device.type != "meta"] if held else []
    size = sum(t.numel() * t.element_size() for t in (*held, *buffers))
    return NetworkState(name, size, sum(p.numel() for p in held))
