"""Image encoders of IP-Adapters: held by the encoder stage, called by the pipelines that denoisers run.

Each lies in its adapter's folder of the model store, and is called by the adapter's id.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers.utils import BaseOutput

from darkroom.errors import ModelNotFound, UnusableModel
from darkroom.models.building import meta_network
from darkroom.models.lone import LoneNetwork, read_config
from darkroom.models.remote import Home, Remote, Send
from darkroom.models.standins import Batched
from darkroom.models.store.model_store import ModelStore, store_of
from darkroom.models.weights import LOADING_ERRORS, load_network, network_size

NAME = "image_encoder"
_STAGE = "encoder"
_KINDS = {"CLIPVisionModelWithProjection": "CLIPImageProcessor", "SiglipVisionModel": "SiglipImageProcessor"}
"""Classes of transformers, each with what makes pixels of pictures for it."""


@dataclass
class ImageFeatures(BaseOutput):  # type: ignore[misc]  # diffusers has no types
    """What an image encoder makes of pictures: one of the two."""

    image_embeds: torch.Tensor | None = None
    """[B, D]."""
    hidden_states: tuple[torch.Tensor, ...] | None = None
    """The last two, [B, T, D] each."""


class ImageEncoder(torch.nn.Module):
    """An image encoder that answers no more than pipelines read: its hidden states would be megabytes on the wire."""

    def __init__(self, network: torch.nn.Module) -> None:
        """`network` is of one of the classes of transformers."""
        super().__init__()
        self.network: Any = network

    @property
    def dtype(self) -> torch.dtype:
        """What it runs in."""
        dtype: torch.dtype = self.network.dtype
        return dtype

    def forward(self, pixel_values: torch.Tensor, output_hidden_states: bool = False) -> Any:  # noqa: FBT001, FBT002 - as transformers has it
        """Of pixels [B, 3, H, W]."""
        answer = self.network(pixel_values, output_hidden_states=output_hidden_states)
        if output_hidden_states:
            return ImageFeatures(hidden_states=tuple(answer.hidden_states[-2:]))
        return ImageFeatures(image_embeds=answer.image_embeds)


def is_ip_adapter(where: Path | ModelStore, adapter_id: str) -> bool:
    """Whether this entry of the model store is an IP-Adapter. Raises ModelNotFound, UnusableModel, StoreUnavailable."""
    folder = store_of(where).fetch_configs(adapter_id)
    return (folder / NAME / "config.json").is_file() and not (folder / "model_index.json").exists()


def image_encoder_sizes(where: Path | ModelStore, adapter_id: str, device: torch.device) -> dict[str, int]:
    """Bytes that it takes on the device, by a name for its files. Raises as loading it does."""
    store = store_of(where)
    if not is_ip_adapter(store, adapter_id):
        raise ModelNotFound(adapter_id)
    store.fetch_weights(adapter_id, NAME)
    folder = store.root / adapter_id / NAME
    try:
        return dict([network_size(store, getattr(transformers, _class_name(folder)), folder, device)])
    except LOADING_ERRORS as error:
        raise UnusableModel(adapter_id, f"loading its image encoder failed ({type(error).__name__})") from error


def load_image_encoder(
    where: Path | ModelStore,
    adapter_id: str,
    device: torch.device,
    *,
    send: Send | None = None,
    dtype: torch.dtype = torch.float32,
) -> LoneNetwork:
    """Loads an adapter's image encoder: with its weights, or, given `send`, only what it takes to call it.

    `dtype`: what a caller elsewhere runs in, whatever the encoder does where it is held. Raises ModelNotFound,
    UnusableModel or StoreUnavailable.
    """
    start_s = time.monotonic()
    store = store_of(where)
    root, folder = store.root, store.root / adapter_id
    if not is_ip_adapter(store, adapter_id):
        raise ModelNotFound(adapter_id)
    if (folder / NAME).resolve().parent.parent != root.resolve():
        raise UnusableModel(adapter_id, "its image encoder lies outside its folder")
    try:
        kind = getattr(transformers, _class_name(folder / NAME))
        if send is None:
            store.fetch_weights(adapter_id, NAME)
            network = ImageEncoder(load_network(kind, folder / NAME, device, store=store))
            face: torch.nn.Module = Batched(network, NAME)
        else:
            network = ImageEncoder(meta_network(kind, folder / NAME).to(dtype))
            face = Remote(network, Home(_STAGE, adapter_id, NAME), send, device=device, dtype=dtype)
    except LOADING_ERRORS as error:
        raise UnusableModel(adapter_id, f"loading its image encoder failed ({type(error).__name__})") from error
    return LoneNetwork(
        model_id=adapter_id,
        name=NAME,
        network=network,
        face=face,
        device=device,
        load_s=time.monotonic() - start_s,
    )


def _class_name(folder: Path) -> str:
    """Raises ValueError, or OSError, unless config.json names one of the classes."""
    names = read_config(folder).get("architectures")
    if not isinstance(names, list) or len(names) != 1 or names[0] not in _KINDS:
        raise ValueError(f"class {names} is none of {', '.join(_KINDS)}")
    return str(names[0])


def load_pixel_maker(root: Path, adapter_id: str, encoder: ImageEncoder) -> Any:
    """What makes pixels of pictures for it: as its folder says, or as diffusers makes it for pipelines without one.

    Raises UnusableModel.
    """
    folder, kind = root / adapter_id / NAME, getattr(transformers, _KINDS[type(encoder.network).__name__])
    size_px = encoder.network.config.image_size
    try:
        if (folder / "preprocessor_config.json").is_file():
            return kind.from_pretrained(folder, local_files_only=True)
        if kind is transformers.CLIPImageProcessor:
            return kind(size=size_px, crop_size=size_px)
        return kind(size={"height": size_px, "width": size_px})
    except LOADING_ERRORS as error:
        raise UnusableModel(adapter_id, "its preprocessor_config.json cannot be used") from error
