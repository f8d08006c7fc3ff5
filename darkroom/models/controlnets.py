"""ControlNets: loaded by id beside the models, held here or called at replicas of the stage `controlnet`.

A ControlNet is a folder of its own in the model store and belongs to no model, so that requests with different models
of one architecture share it.
"""

import asyncio
import functools
import json
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import structlog
import torch

from darkroom.errors import ModelNotFound, UnusableModel
from darkroom.models.loader import NetworkState, Part, load_network, meta_network, network_state, running_dtype
from darkroom.models.remote import Home, Remote, Send
from darkroom.models.standins import Batched

_log = structlog.get_logger()
_NAME, _STAGE = "controlnet", "controlnet"
_MAX_CONFIG_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlNetKind:
    """A class of ControlNets of diffusers."""

    several: str
    """The class that stands for several of them."""
    families: tuple[str, ...]
    """Pipeline classes, as in the family table, whose denoisers it leads."""
    alike: tuple[str, ...]
    """Keys of the config in which it must agree with the denoiser that it leads."""
    shared: tuple[str, ...] = ()
    """Arguments of its forward that have no batch dimension."""


_JOINT = ("num_attention_heads", "attention_head_dim", "joint_attention_dim", "in_channels")
KINDS: Mapping[str, ControlNetKind] = {
    "ControlNetModel": ControlNetKind(
        several="MultiControlNetModel",
        families=("StableDiffusionPipeline", "StableDiffusionXLPipeline"),
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
        families=("FluxPipeline",),
        alike=(*_JOINT, "pooled_projection_dim"),
        shared=("img_ids", "txt_ids"),
    ),
    "QwenImageControlNetModel": ControlNetKind(
        several="QwenImageMultiControlNetModel", families=("QwenImagePipeline",), alike=_JOINT
    ),
}
"""The classes that can be served, by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlNet:
    """One ControlNet: here with its weights, or elsewhere and here by its config only."""

    model_id: str
    kind: ControlNetKind
    network: Any
    face: torch.nn.Module
    """What stands for it in pipelines."""
    device: torch.device
    load_s: float

    @property
    def networks(self) -> Mapping[str, torch.nn.Module]:
        """The network under the name by which other replicas call it."""
        return {_NAME: self.network}

    def stand_in(self, name: str) -> torch.nn.Module | None:
        """What stands for the network of that name."""
        return self.face if name == _NAME else None

    def network_states(self) -> list[NetworkState]:
        """How much of it is here."""
        return [network_state(_NAME, self.network)]

    def misfit(self, part: Part) -> str | None:
        """Why it cannot lead this model's denoiser; None if it can."""
        if part.family.pipeline not in self.kind.families:
            return f"is a {type(self.network).__name__}, which leads no {part.family.pipeline}"
        own, led = self.network.config, part.denoiser_config
        for key in self.kind.alike:
            if _listed(own.get(key)) != _listed(led.get(key)):
                return f"has a {key} of {own.get(key)} where the model has {led.get(key)}"
        return None


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def load_controlnet(root: Path, controlnet_id: str, device: torch.device, *, send: Send | None = None) -> ControlNet:
    """Loads `<root>/<controlnet_id>`: with its weights, or, given `send`, only what it takes to call it elsewhere.

    Raises ModelNotFound or UnusableModel.
    """
    start_s = time.monotonic()
    folder = root / controlnet_id
    if not (folder / "config.json").is_file():
        raise ModelNotFound(controlnet_id)
    if not folder.resolve().is_relative_to(root.resolve()):
        raise UnusableModel(controlnet_id, "its folder lies outside the model store")
    name = _class_name(folder, controlnet_id)
    kind = KINDS[name]
    try:
        if send is None:
            network = load_network(getattr(diffusers, name), folder, device)
            face: torch.nn.Module = Batched(network, _NAME, shared=kind.shared)
        else:
            network = meta_network(getattr(diffusers, name), folder)
            home = Home(_STAGE, controlnet_id, _NAME)
            face = Remote(network, home, send, device=device, dtype=running_dtype(folder, device))
    except (
        OSError,
        ValueError,
        TypeError,
        KeyError,
        RuntimeError,
        AttributeError,
    ) as error:  # what a bad folder makes the loaders raise
        raise UnusableModel(controlnet_id, f"loading it failed ({type(error).__name__})") from error
    return ControlNet(
        model_id=controlnet_id,
        kind=kind,
        network=network,
        face=face,
        device=device,
        load_s=time.monotonic() - start_s,
    )


def _class_name(folder: Path, controlnet_id: str) -> str:
    try:
        with (folder / "config.json").open() as file:
            config = json.loads(file.read(_MAX_CONFIG_BYTES + 1))
    except (OSError, ValueError, RecursionError) as error:
        raise UnusableModel(controlnet_id, "its config.json cannot be read") from error
    name = config.get("_class_name") if isinstance(config, dict) else None
    if name not in KINDS:
        raise UnusableModel(controlnet_id, f"its class is none of {', '.join(KINDS)}")
    return str(name)


class ControlNets:
    """The ControlNets that the requests of a replica share. Its methods are called on one event loop."""

    def __init__(self, root: Path, device: torch.device, *, send: Send | None = None) -> None:
        """`send`: None holds them here; else they are called at the stage `controlnet`."""
        self._root, self._device, self._send = root, device, send
        self._loads: dict[str, asyncio.Task[ControlNet]] = {}
        self.on_loaded: Callable[[Collection[str]], Awaitable[None]] | None = None
        """Told the ids of all that are loaded, when one is added."""

    async def get(self, controlnet_id: str) -> ControlNet:
        """The ControlNet, loaded on first use; concurrent callers share one load.

        Raises ModelNotFound or UnusableModel. A failed load is tried again by the next request.
        """
        task = self._loads.get(controlnet_id)
        if task is None:
            task = self._loads[controlnet_id] = asyncio.create_task(self._load(controlnet_id))
            task.add_done_callback(lambda task: task.cancelled() or task.exception())  # all callers may have left
        return await asyncio.shield(task)

    @property
    def loaded(self) -> tuple[ControlNet, ...]:
        """Those that are here, by id."""
        done = [task for task in self._loads.values() if task.done()]  # a failed one is not kept
        return tuple(sorted((task.result() for task in done), key=lambda net: net.model_id))

    async def _load(self, controlnet_id: str) -> ControlNet:
        try:
            net = await asyncio.to_thread(load_controlnet, self._root, controlnet_id, self._device, send=self._send)
        except BaseException as error:
            del self._loads[controlnet_id]
            _log.error("load_failed", controlnet_id=controlnet_id, problem=str(error), cause=repr(error.__cause__))
            raise
        _log.info("loaded", controlnet_id=controlnet_id, load_s=round(net.load_s, 3))
        if self.on_loaded:
            await self.on_loaded({other.model_id for other in self.loaded} | {controlnet_id})
        return net


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
