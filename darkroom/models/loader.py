"""Builds a pipeline with only a stage's networks present; the others come from their configs, on the meta device.

A model's files are not trusted: only classes of diffusers and transformers, only safetensors, no code from the folder.
"""

import inspect
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import structlog
import torch
import transformers
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.pipelines.auto_pipeline import AUTO_INPAINT_PIPELINES_MAPPING, AUTO_TEXT2IMAGE_PIPELINES_MAPPING
from torch.utils._pytree import register_pytree_node
from transformers import PreTrainedModel

from darkroom.errors import DarkroomError, ModelNotFound, UnusableModel
from darkroom.families import FAMILIES, REFINERS, UNSUPPORTED, Family
from darkroom.models.building import meta_network
from darkroom.models.derived import NotDerivable, derived_family
from darkroom.models.previews import PreviewMap, load_map
from darkroom.models.remote import Home, Remote, Send
from darkroom.models.standins import Absent, Batched
from darkroom.models.store.host import Corrupt
from darkroom.models.store.model_store import ModelStore, store_of
from darkroom.models.weights import LOADING_ERRORS, files_of, load_networks, network_size
from darkroom.wire.fields import MAX_SEQUENCE_LENGTH

_log = structlog.get_logger()
_LIBRARIES = {"diffusers": diffusers, "transformers": transformers}
_CONDITIONING = ("text_encoder", "tokenizer", "image_encoder", "feature_extractor")
_VAE_METHODS = ("encode", "decode")
_MAX_INDEX_BYTES = 1 << 20

# Else a batch's distribution of latents would be a leaf, and every request that shared the batch would get all of it.
register_pytree_node(
    DiagonalGaussianDistribution,
    lambda latents: ([latents.parameters], latents.deterministic),
    lambda parameters, deterministic: DiagonalGaussianDistribution(*parameters, deterministic=deterministic),
)


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
    preview_map: PreviewMap | None = None
    """How its latents look; None when nobody fitted a map."""
    max_sequence_length: int | None = None
    """Tokens of the longest prompt, where its darkroom.json says other than its pipeline."""
    variants: dict[type, DiffusionPipeline] = field(default_factory=dict, init=False, repr=False)
    """Pipelines of other tasks over the same components, made when they are first needed."""
    beside: dict[str, Any] = field(default_factory=dict, init=False, repr=False)
    """What others keep with the part, and lose with it."""

    def stand_in(self, name: str) -> Any:
        """What stands for a network in the pipeline; None if it has none of that name."""
        return getattr(self.pipeline, name, None) if name in self.networks else None

    def network_states(self) -> list[NetworkState]:
        """What is resident, network by network, counted from the parameters themselves."""
        return [network_state(name, network) for name, network in sorted(self.networks.items())]

    @property
    def denoiser_names(self) -> tuple[str, ...]:
        """Components of the denoising loop that this model has: at least one."""
        return tuple(name for name in self.family.denoisers if name in self.networks)

    @property
    def denoiser(self) -> Any:
        """What stands for the first of them in the pipeline."""
        return getattr(self.pipeline, self.denoiser_names[0])

    @property
    def denoiser_config(self) -> Mapping[str, Any]:
        """The denoiser's config, whether it is here or not."""
        config: Mapping[str, Any] = self.denoiser.config
        return config


def load_part(
    where: Path | ModelStore, model_id: str, stage: str, device: torch.device, *, send: Send | None = None
) -> Part:
    """Loads the part of a model that `stage` (encoder, denoiser or vae) runs.

    `send` calls networks that other stages hold, where a denoising pipeline calls some; None makes them absent.
    Raises ModelNotFound, UnusableModel or StoreUnavailable.
    """
    start_s = time.monotonic()
    store = store_of(where)
    folder = store.fetch_configs(model_id)
    if not (folder / "model_index.json").is_file():
        raise ModelNotFound(model_id)
    index, family = _read_family(store, folder)
    try:
        pipeline, networks = _assemble(store, folder, index, family, stage=stage, device=device, send=send)
    except Corrupt as error:
        raise UnusableModel(model_id, f"a file of its {stage} part is corrupt: {error}") from error
    except LOADING_ERRORS as error:
        raise UnusableModel(model_id, f"loading its {stage} part failed ({type(error).__name__})") from error
    if not any(name in networks for name in family.denoisers):
        raise UnusableModel(model_id, f"it has no {' or '.join(family.denoisers)}")
    part = Part(
        model_id=model_id,
        family=family,
        pipeline=pipeline,
        networks=networks,
        device=device,
        load_s=time.monotonic() - start_s,
        preview_map=load_map(folder) if stage == "denoiser" else None,
        max_sequence_length=_read_max_sequence_length(folder, model_id),
    )
    for key, values in family.requires.items():
        if part.denoiser_config.get(key) not in values:
            raise UnusableModel(model_id, f"its {key} of {part.denoiser_config.get(key)} is not supported")
    return part


def _read_family(store: ModelStore, folder: Path) -> tuple[dict[str, Any], Family]:
    if not folder.resolve().is_relative_to(store.root.resolve()):
        raise UnusableModel(folder.name, "its folder lies outside the model store")
    index = _read_object(folder, "model_index.json", folder.name)
    return index, _family_of(index, folder.name)


def part_sizes(where: Path | ModelStore, model_id: str, stage: str, device: torch.device) -> dict[str, int]:
    """Bytes that each network of a part takes on the device; equal networks of other models have the same name.

    Fetches the files, as `load_part` does, and raises what it does.
    """
    store = store_of(where)
    folder = store.fetch_configs(model_id)
    if not (folder / "model_index.json").is_file():
        raise ModelNotFound(model_id)
    index, family = _read_family(store, folder)
    names = _networks_of(model_id, index, family, stage)
    store.fetch_weights(model_id, *names)
    try:
        return dict(
            network_size(store, _component_class(model_id, name, *index[name]), folder / name, device) for name in names
        )
    except LOADING_ERRORS as error:
        raise UnusableModel(model_id, f"loading its {stage} part failed ({type(error).__name__})") from error


def fetch_part(where: Path | ModelStore, model_id: str, stage: str) -> None:
    """Makes sure that the files of a stage's part can be read: brings them to this node, if its disk has room.

    Raises ModelNotFound, UnusableModel or StoreUnavailable.
    """
    store = store_of(where)
    folder = store.fetch_configs(model_id)
    if not (folder / "model_index.json").is_file():
        raise ModelNotFound(model_id)
    store.fetch_weights(model_id, *_networks_of(model_id, *_read_family(store, folder), stage))


def part_files(where: Path | ModelStore, model_id: str, stage: str) -> list[Path] | None:
    """The weights of a stage's part, where all of them can be read; None where not, or where nobody can tell."""
    store = store_of(where)
    folder = store.root / model_id
    try:
        index, family = _read_family(store, folder)
        found: list[Path] = []
        present: set[Path] = set()
        for name in _networks_of(model_id, index, family, stage):
            found += files_of(store, _component_class(model_id, name, *index[name]), folder / name)
            present.update(store.weights(folder / name))
        return found if present.issuperset(found) else None
    except (DarkroomError, *LOADING_ERRORS):
        return None


def _read_object(folder: Path, name: str, model_id: str) -> dict[str, Any]:
    try:
        found = json.loads((folder / name).read_text()[: _MAX_INDEX_BYTES + 1])
    except (OSError, ValueError, RecursionError) as error:
        raise UnusableModel(model_id, f"its {name} cannot be read") from error
    if not isinstance(found, dict):
        raise UnusableModel(model_id, f"its {name} is no object")
    return found


def _read_max_sequence_length(folder: Path, model_id: str) -> int | None:
    if not (folder / "darkroom.json").exists():
        return None
    length = _read_object(folder, "darkroom.json", model_id).get("max_sequence_length")
    if length is not None and (type(length) is not int or not 1 <= length <= MAX_SEQUENCE_LENGTH):
        raise UnusableModel(model_id, f"its max_sequence_length is no number from 1 to {MAX_SEQUENCE_LENGTH}")
    return length


def _family_of(index: dict[str, Any], model_id: str) -> Family:
    """The table's row, or one read off the class. A model made for inpainting is of the family that it repaints for."""
    name = str(index.get("_class_name"))
    if name in FAMILIES or name in REFINERS:
        return FAMILIES.get(name) or REFINERS[name]
    for key, kind in AUTO_INPAINT_PIPELINES_MAPPING.items():
        whole = AUTO_TEXT2IMAGE_PIPELINES_MAPPING.get(key)
        if kind.__name__ == name and whole is not None and whole.__name__ in FAMILIES:
            return FAMILIES[whole.__name__]
    if name in UNSUPPORTED:
        raise UnusableModel(model_id, f"{name} is not supported: {UNSUPPORTED[name]}")
    kind = getattr(diffusers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, DiffusionPipeline)):
        raise UnusableModel(model_id, "its pipeline class is none of diffusers")
    try:
        family = derived_family(kind)
    except NotDerivable as problem:
        raise UnusableModel(model_id, f"its pipeline class is not in the table, and {problem}") from problem
    _log.warning("pipeline_without_row", model_id=model_id, pipeline=name, consequence="requests share no batch")
    return family


def _assemble(
    store: ModelStore,
    folder: Path,
    index: dict[str, Any],
    family: Family,
    *,
    stage: str,
    device: torch.device,
    send: Send | None,
) -> tuple[DiffusionPipeline, dict[str, torch.nn.Module]]:
    own = _networks_of(folder.name, index, family, stage)
    store.fetch_weights(folder.name, *own)
    kinds = {name: _component_class(folder.name, name, *index[name]) for name in own}
    networks = load_networks(store, {name: (kind, folder / name) for name, kind in kinds.items()}, device)
    components: dict[str, Any] = {}
    away: dict[str, Any] = {}
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
            if name in networks:
                components[name] = present(name, networks[name], family)
            else:
                away[name] = kind
        elif issubclass(kind, SchedulerMixin) or stage == "encoder":
            components[name] = kind.from_pretrained(folder / name, local_files_only=True)
        else:
            components[name] = None
    # absent networks run in the type of those here, as if the whole pipeline were loaded in it
    dtype: Any = next((network.dtype for network in networks.values()), torch.float32)
    for name, kind in away.items():
        networks[name] = meta_network(kind, folder / name)
        home = Home(_stage_of(name, family), folder.name, name)
        sent = send if stage == "denoiser" else None
        components[name] = _away(networks[name], home, sent, device=device, dtype=dtype)
    pipeline_class = getattr(diffusers, family.pipeline)
    accepted = inspect.signature(pipeline_class).parameters
    pipeline = pipeline_class(**{name: value for name, value in components.items() if name in accepted})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, networks


def _networks_of(model_id: str, index: dict[str, Any], family: Family, stage: str) -> list[str]:
    """Names of the components whose weights this stage holds."""
    named = {name: entry for name, entry in index.items() if isinstance(entry, list) and entry[0] is not None}
    return [
        name
        for name, entry in named.items()
        if _stage_of(name, family) == stage
        and issubclass(_component_class(model_id, name, *entry), ModelMixin | PreTrainedModel)
    ]


def _stage_of(name: str, family: Family) -> str:
    if name in family.denoisers:
        return "denoiser"
    return "encoder" if name.startswith(_CONDITIONING) else "vae"


def _component_class(model_id: str, name: str, library: str, class_name: str) -> Any:
    kind = getattr(_LIBRARIES.get(library), class_name, None)
    if not isinstance(kind, type):
        raise UnusableModel(model_id, f"its component {name} is no class of diffusers or transformers")
    return kind


def _away(
    network: torch.nn.Module, home: Home, send: Send | None, *, device: torch.device, dtype: torch.dtype
) -> torch.nn.Module:
    if send is None:
        return Absent(network, device=device, dtype=dtype)
    return Remote(network, home, send, device=device, dtype=dtype)


def present(name: str, network: torch.nn.Module, family: Family) -> torch.nn.Module:
    """What stands for a component that this stage holds."""
    if name in family.denoisers:
        stand_in = Batched(
            network, name, shared=family.shared, row_lists=family.row_lists, is_batched=family.is_batched
        )
        first = next(network.parameters())
        stand_in.__dict__.update(device=first.device, dtype=network.dtype)  # asked at each step, by walking all modules
        return stand_in
    methods = (
        tuple(method for method in _VAE_METHODS if hasattr(network, method)) if isinstance(network, ModelMixin) else ()
    )
    return Batched(network, name, methods=("forward", *methods), is_batched=family.is_batched)


def network_state(name: str, network: torch.nn.Module) -> NetworkState:
    """How much of it is here: what lives on the meta device takes no room."""
    held = [p for p in network.parameters() if p.device.type != "meta"]
    buffers = [b for b in network.buffers() if b.device.type != "meta"] if held else []
    size = sum(t.numel() * t.element_size() for t in (*held, *buffers))
    return NetworkState(name, size, sum(p.numel() for p in held))
