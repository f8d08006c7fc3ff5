"""ControlNets: loaded by id beside the models, held here or called at replicas of the stage `controlnet`.

A ControlNet is a folder of its own in the model store and belongs to no model, so that requests with different models
of one architecture share it.
"""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch

from darkroom.errors import ModelNotFound, UnusableModel
from darkroom.families import CONTROLNETS
from darkroom.models.building import meta_network
from darkroom.models.loader import Part
from darkroom.models.lone import LoneNetwork, OnDemand, read_config
from darkroom.models.remote import Home, Remote, Send
from darkroom.models.standins import Batched
from darkroom.models.store.model_store import ModelStore, store_of
from darkroom.models.weights import LOADING_ERRORS, load_network, network_size, running_dtype

_NAME, _STAGE = "controlnet", "controlnet"


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlNetKind:
    """A class of ControlNets of diffusers."""

    several: str
    """The class that stands for several of them."""
    alike: tuple[str, ...]
    """Keys of the config in which it must agree with the denoiser that it leads."""
    shared: tuple[str, ...] = ()
    """Arguments of its forward that have no batch dimension."""


_JOINT = ("num_attention_heads", "attention_head_dim", "joint_attention_dim", "in_channels")
KINDS: Mapping[str, ControlNetKind] = {
    "ControlNetModel": ControlNetKind(
        several="MultiControlNetModel",
        alike=(
            "block_out_channels",
            "layers_per_block",
            "cross_attention_dim",
            "addition_embed_type",
            "projection_class_embeddings_input_dim",
        ),
    ),
    "FluxControlNetModel": ControlNetKind(
        several="FluxMultiControlNetModel",
        alike=(*_JOINT, "pooled_projection_dim"),
        shared=("img_ids", "txt_ids"),
    ),
    "QwenImageControlNetModel": ControlNetKind(several="QwenImageMultiControlNetModel", alike=_JOINT),
}
"""The classes that can be served, by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlNet(LoneNetwork):
    """One ControlNet."""

    kind: ControlNetKind

    def misfit(self, part: Part) -> str | None:
        """Why it cannot lead this model's denoiser; None if it can."""
        name = type(self.network).__name__
        if part.family.pipeline not in CONTROLNETS[name]:
            return f"is a {name}, which leads no {part.family.pipeline}"
        own, led = self.network.config, part.denoiser_config
        for key in self.kind.alike:
            if _listed(own.get(key)) != _listed(led.get(key)):
                return f"has a {key} of {own.get(key)} where the model has {led.get(key)}"
        return None


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def load_controlnet(
    where: Path | ModelStore, controlnet_id: str, device: torch.device, *, send: Send | None = None
) -> ControlNet:
    """Loads a ControlNet: with its weights, or, given `send`, only what it takes to call it elsewhere.

    Raises ModelNotFound, UnusableModel or StoreUnavailable.
    """
    start_s = time.monotonic()
    store = store_of(where)
    root, folder = store.root, store.fetch_configs(controlnet_id)
    if not (folder / "config.json").is_file():
        raise ModelNotFound(controlnet_id)
    if not folder.resolve().is_relative_to(root.resolve()):
        raise UnusableModel(controlnet_id, "its folder lies outside the model store")
    name = _class_name(folder, controlnet_id)
    kind = KINDS[name]
    store.fetch_weights(controlnet_id, ".")
    try:
        if send is None:
            network = load_network(getattr(diffusers, name), folder, device, store=store)
            face: torch.nn.Module = Batched(network, _NAME, shared=kind.shared)
        else:
            network = meta_network(getattr(diffusers, name), folder)
            home = Home(_STAGE, controlnet_id, _NAME)
            face = Remote(network, home, send, device=device, dtype=running_dtype(store, folder, device))
    except LOADING_ERRORS as error:
        raise UnusableModel(controlnet_id, f"loading it failed ({type(error).__name__})") from error
    return ControlNet(
        model_id=controlnet_id,
        name=_NAME,
        kind=kind,
        network=network,
        face=face,
        device=device,
        load_s=time.monotonic() - start_s,
    )


def _class_name(folder: Path, controlnet_id: str) -> str:
    try:
        name = read_config(folder).get("_class_name")
    except (OSError, ValueError) as error:
        raise UnusableModel(controlnet_id, "its config.json cannot be read") from error
    if name not in KINDS:
        raise UnusableModel(controlnet_id, f"its class is none of {', '.join(KINDS)}")
    return str(name)


def controlnet_sizes(where: Path | ModelStore, controlnet_id: str, device: torch.device) -> dict[str, int]:
    """Bytes that it takes on the device, by a name for its files. Raises as loading it does."""
    store = store_of(where)
    folder = store.fetch_configs(controlnet_id)
    if not (folder / "config.json").is_file():
        raise ModelNotFound(controlnet_id)
    store.fetch_weights(controlnet_id, ".")
    try:
        return dict([network_size(store, getattr(diffusers, _class_name(folder, controlnet_id)), folder, device)])
    except LOADING_ERRORS as error:
        raise UnusableModel(controlnet_id, f"loading it failed ({type(error).__name__})") from error


class ControlNets(OnDemand[str, ControlNet]):
    """The ControlNets that the requests of a replica share. Getting one raises ModelNotFound or UnusableModel."""

    def __init__(self, store: Path | ModelStore, device: torch.device, *, send: Send | None = None) -> None:
        """`send`: None holds them here; else they are called at the stage `controlnet`."""
        held = None if send else lambda controlnet_id: controlnet_sizes(store, controlnet_id, device)
        super().__init__(lambda controlnet_id: load_controlnet(store, controlnet_id, device, send=send), measure=held)


def together(
    nets: Sequence[torch.nn.Module], kind: ControlNetKind, *, dtype: torch.dtype, device: torch.device
) -> torch.nn.Module:
    """What stands in a pipeline for several ControlNets, given as what stands for each."""
    several: torch.nn.Module = _without_parameters(getattr(diffusers.models.controlnets, kind.several))(nets)
    several.__dict__.update(own_dtype=dtype, own_device=device)
    return several


@functools.cache
def _without_parameters(kind: type) -> Callable[[Sequence[torch.nn.Module]], torch.nn.Module]:
    """The class, told its type and device: it would look for them in parameters, of which stand-ins have none."""
    told = {"dtype": property(lambda self: self.own_dtype), "device": property(lambda self: self.own_device)}
    return type(kind.__name__, (kind,), told)
