"""Small stores of files that are shaped like models."""

import json
import struct
from pathlib import Path

WEIGHTS = "diffusion_pytorch_model.safetensors"


def safetensors(values: bytes) -> bytes:
    """A safetensors file of one tensor with these bytes."""
    header = json.dumps({"weight": {"dtype": "U8", "shape": [len(values)], "data_offsets": [0, len(values)]}}).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + values


def make_store(root: Path, *entry_ids: str, size_bytes: int = 3000) -> None:
    """Entries of three files each; the weights of each have bytes of their own."""
    for entry_id in entry_ids:
        folder = root / entry_id
        (folder / "unet").mkdir(parents=True)
        (folder / "model_index.json").write_text(json.dumps({"_class_name": "X", "unet": ["diffusers", "Y"]}))
        (folder / "unet" / "config.json").write_text(json.dumps({"_class_name": "Y"}))
        (folder / "unet" / WEIGHTS).write_bytes(safetensors((entry_id.encode() * size_bytes)[:size_bytes]))
