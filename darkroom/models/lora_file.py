"""Reads the file of a LoRA: which tensors it has, and what it says of how they were trained.

The rule: the file is data from a stranger. Only safetensors is read, only from the store, and every value is checked.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from darkroom.errors import InvalidField
from darkroom.wire.fields import check_model_id

MAX_HEADER_BYTES = 16 << 20
_MAX_TENSORS = 50_000
_MAX_SETTINGS_BYTES = 1 << 20
_LENGTH_BYTES = 8
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,512}")
_METADATA_KEY = "lora_adapter_metadata"

Tensors = dict[str, torch.Tensor]


class Refused(Exception):
    """The file cannot be used. The message says why."""


class Unfit(Refused):
    """The LoRA is for another model than this one. The message says how that shows."""


def weights_file(root: Path, lora_id: str) -> Path:
    """The one safetensors file of the folder, in the store. Raises FileNotFoundError, or Refused."""
    try:
        folder, store = (root / check_model_id(lora_id)).resolve(), root.resolve()
    except InvalidField as error:
        raise FileNotFoundError(lora_id) from error
    if folder.parent != store or not folder.is_dir() or (folder / "model_index.json").exists():
        raise FileNotFoundError(lora_id)
    found = [path for path in folder.iterdir() if path.suffix == ".safetensors"]
    if not found:
        raise FileNotFoundError(lora_id)
    if len(found) > 1:
        raise Refused(f"has {len(found)} files of weights, not one")
    path = found[0].resolve()
    if not path.is_relative_to(store) or not path.is_file():
        raise Refused("has its weights outside the model store")
    return path


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


def read_tensors(path: Path, max_bytes: int) -> tuple[Tensors, dict[str, Any] | None]:
    """Every tensor of the file, finite, and what the file says of how it was trained. Raises Refused."""
    try:
        _check_length(path, max_bytes)
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            if not 1 <= len(names) <= _MAX_TENSORS:
                raise Refused(f"has {len(names)} tensors, not 1 to {_MAX_TENSORS}")
            tensors = {name: _checked(name, file.get_tensor(name)) for name in names}
            return tensors, _read_metadata(file.metadata())
    except (SafetensorError, OSError, UnicodeDecodeError) as error:
        raise Refused(f"has a file that is no safetensors: {str(error)[:200]}") from error


def _check_length(path: Path, max_bytes: int) -> None:
    """Raises Refused unless the file, and its header, have a sensible length."""
    size_bytes = path.stat().st_size
    if size_bytes > max_bytes:
        raise Refused(f"has a file of {size_bytes} bytes; at most {max_bytes} are allowed")
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(_LENGTH_BYTES), "little")
    if header_bytes > min(MAX_HEADER_BYTES, size_bytes - _LENGTH_BYTES):
        raise Refused("has a file that is no safetensors: its header does not fit")


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


def _read_metadata(header: Mapping[str, str] | None) -> dict[str, Any] | None:
    try:
        found = json.loads((header or {}).get(_METADATA_KEY) or "null")
    except (ValueError, RecursionError) as error:
        raise Refused(f"has {_METADATA_KEY} that is no JSON") from error
    if found is not None and not isinstance(found, dict):
        raise Refused(f"has {_METADATA_KEY} that is no JSON object")
    return found
