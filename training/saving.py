"""What a training leaves in the store: diffusers' formats, half the bytes, float32 when loaded.

Weights are stored in half precision, and configs of transformers' classes say float32, which loaders of diffusers'
classes take anyway: half the bytes, and everything computes in float32.
"""

import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from diffusers import DiffusionPipeline, ModelMixin
from torch import nn
from transformers import PreTrainedModel

from training.scenes import SIZE_PX


def save_pipeline(pipe: DiffusionPipeline, folder: Path, *, steps: int, guidance: float, **more: int) -> None:
    """Writes the pipeline in diffusers' directory format, in one go.

    `steps` and `guidance` are what the model is asked for where nobody says otherwise; `more` goes to darkroom.json as
    well. Files beside the pipeline's own, such as the card, stay. The networks given are left as they are.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    halved = copy.deepcopy(pipe)
    for part in halved.components.values():
        if isinstance(part, nn.Module):
            part.half()
    halved.save_pretrained(partial, safe_serialization=True)
    for config in partial.glob("*/config.json"):
        _tidy_config(config)
    sides = dict.fromkeys(("default_width_px", "default_height_px"), SIZE_PX)
    defaults = {**sides, "default_step_count": steps, "default_guidance_scale": guidance, **more}
    _write_settings(partial, defaults)
    let_all_read(partial)
    if folder.is_dir():
        for kept in folder.iterdir():
            if kept.is_file() and not (partial / kept.name).exists():
                shutil.copy2(kept, partial)
        shutil.rmtree(folder)
    partial.rename(folder)


def save_network(network: ModelMixin | PreTrainedModel, folder: Path, *, base: str | None = None) -> None:
    """Writes one network as its class does. `base`: id of the model that it is made for. The network is left as is."""
    copy.deepcopy(network).half().save_pretrained(folder)
    _tidy_config(folder / "config.json")
    if base:
        say_base(folder, base)
    let_all_read(folder)


def say_base(folder: Path, base: str) -> None:
    """Writes which model something is made for, so that no other is led by it."""
    _write_settings(folder, {"base_model": base})


def let_all_read(folder: Path) -> None:
    """Lets everyone read the weights, which safetensors keeps to their owner."""
    for file in folder.rglob("*.safetensors"):
        file.chmod(0o644)


def _tidy_config(config: Path) -> None:
    """Removes where it was loaded from on the machine that trained it; transformers' classes get their float32."""
    entries = json.loads(config.read_text())
    entries.pop("_name_or_path", None)
    if "dtype" in entries:
        entries["dtype"] = "float32"
    config.write_text(json.dumps(entries, indent=2) + "\n")


def _write_settings(folder: Path, settings: Mapping[str, object]) -> None:
    (folder / "darkroom.json").write_text(json.dumps(settings) + "\n")
