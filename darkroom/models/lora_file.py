"""Reads the file of a LoRA: which tensors it has, and what it says of how they were trained.

The rule: the file is data from a stranger. Only safetensors is read, only from the store, and every value is checked.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from darkroom.errors import InvalidField, ModelNotFound, UnusableModel
from darkroom.models.store.host import Corrupt
from darkroom.models.store.model_store import ModelStore
from darkroom.wire.fields import check_model_id

_MAX_SETTINGS_BYTES = 1 << 20
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,512}")
_DENOISERS = ("unet.", "lora_unet_", "transformer.", "lora_transformer_", "diffusion_model.")
"""How names of tensors begin that change the denoiser, as diffusers, kohya's scripts and ComfyUI write them."""
_METADATA_KEY = "lora_adapter_metadata"

Tensors = dict[str, torch.Tensor]


class Refused(Exception):
    """The file cannot be used. The message says why."""


class Unfit(Refused):
    """The LoRA is for another model than this one. The message says how that shows."""


def weights_file(store: ModelStore, lora_id: str) -> Path:
    """The one safetensors file of the folder, in the store. Raises FileNotFoundError, Refused or StoreUnavailable."""
    try:
        folder, root = store.fetch_adapter(check_model_id(lora_id)).resolve(), store.root.resolve()
    except (InvalidField, ModelNotFound) as error:
        raise FileNotFoundError(lora_id) from error
    except UnusableModel as error:
        raise Refused(error.facts["problem"]) from error
    if folder.parent != root or (folder / "model_index.json").exists():
        raise FileNotFoundError(lora_id)
    found = store.weights(folder)
    if not found:
        raise FileNotFoundError(lora_id)
    if len(found) > 1:
        raise Refused(f"has {len(found)} files of weights, not one")
    path = found[0].resolve()
    if not path.is_relative_to(root):
        raise Refused("has its weights outside the model store")
    return path


def changes_text(store: ModelStore, lora_id: str) -> bool:
    """Whether the LoRA may change how prompts are encoded, by the names of its tensors: only its header is read.

    Raises DarkroomError, Malformed, OSError, or ValueError for one that cannot be looked into.
    """
    (path,) = store.adapter_weights(check_model_id(lora_id))
    return not all(name.startswith(_DENOISERS) for name in store.header(path).tensors)


def check_base(folder: Path, model_id: str) -> None:
    """Raises Unfit if darkroom.json names another base model; without the file, the shapes decide."""
    try:
        with (folder / "darkroom.json").open("rb") as file:
            found = json.loads(file.read(_MAX_SETTINGS_BYTES))
    except FileNotFoundError:
        return
    except (OSError, ValueError, RecursionError) as error:
        raise Refused("has a darkroom.json that cannot be read") from error
    base = found.get("base_model") if isinstance(found, dict) else None
    if base is not None and base != model_id:
        raise Unfit(f"is for base model {str(base)[:64]!r}, not {model_id!r}")


def read_tensors(store: ModelStore, path: Path, max_bytes: int) -> tuple[Tensors, dict[str, Any] | None]:
    """Every tensor of the file, finite, and what the file says of how it was trained. Raises Refused."""
    try:
        size_bytes = store.size_bytes(path)
        if size_bytes > max_bytes:
            raise Refused(f"has a file of {size_bytes} bytes; at most {max_bytes} are allowed")
        file = store.read(path)
    except Corrupt as error:
        raise Refused(f"has a safetensors file that cannot be used: {error}") from error
    except OSError as error:
        raise Refused(f"has a file that cannot be read: {error.strerror}") from error
    return {name: _checked(name, tensor) for name, tensor in file.tensors().items()}, _read_metadata(
        file.header.metadata
    )


def _checked(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if not _NAME.fullmatch(name):
        raise Refused(f"has a tensor with the name {name[:64]!r}")
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise Refused(f"has a tensor {name} of {tensor.dtype}, not of floating point numbers")
    if not bool(torch.isfinite(tensor).all()):
        raise Refused(f"has a tensor {name} with values that are not finite")
    if name.endswith(".alpha") and (tensor.numel() != 1 or tensor.item() <= 0):
        raise Refused(f"has an alpha {name} that is not one number above 0")  # diffusers halves a negative one for ever
    return tensor


def _read_metadata(header: Mapping[str, str]) -> dict[str, Any] | None:
    try:
        found = json.loads(header.get(_METADATA_KEY) or "null")
    except (ValueError, RecursionError) as error:
        raise Refused(f"has {_METADATA_KEY} that is no JSON") from error
    if found is not None and not isinstance(found, dict):
        raise Refused(f"has {_METADATA_KEY} that is no JSON object")
    return found
