"""LoRA files for the tiny models, with random weights, in the formats that people publish."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

Pairs = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""Both factors, by the module's name."""


def factors(
    network: torch.nn.Module, targets: Callable[[str], bool], *, rank: int, seed: int, strength: float = 0.2
) -> Pairs:
    """Random factors for every linear and convolutional layer that `targets` picks by name."""
    noise = torch.Generator().manual_seed(seed)
    pairs: Pairs = {}
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d) and targets(name):
            out, *inner = module.weight.shape
            down = torch.randn(rank, *inner, generator=noise) / math.sqrt(math.prod(inner))
            up = torch.randn(out, rank, *[1] * (len(inner) - 1), generator=noise) * strength
            pairs[name] = (down, up)
    assert pairs
    return pairs


def is_attention(name: str) -> bool:
    return name.rsplit(".", 1)[-1] in {"to_q", "to_k", "to_v", "q_proj", "v_proj", "out_proj"} or "to_out.0" in name


def is_any(name: str) -> bool:
    return is_attention(name) or any(part in name for part in ("conv1", "conv2", "proj_in", "time_emb_proj", "ff.net"))


def diffusers_names(network: str, pairs: Pairs) -> dict[str, torch.Tensor]:
    """As diffusers and PEFT save it."""
    return {
        f"{network}.{name}.lora_{letter}.weight": tensor
        for name, pair in pairs.items()
        for letter, tensor in zip("AB", pair, strict=True)
    }


def magnitudes(network: torch.nn.Module, pairs: Pairs, *, seed: int) -> dict[str, torch.Tensor]:
    """A length for every output channel, off that of its weights by up to a half, in PEFT's shapes."""
    noise, lengths = torch.Generator().manual_seed(seed), {}
    for name in pairs:
        weight = network.get_parameter(f"{name}.weight").detach()
        length = weight.flatten(1).norm(dim=1) * (0.5 + torch.rand(len(weight), generator=noise))
        lengths[name] = length if weight.ndim == 2 else length.view(1, -1, *[1] * (weight.ndim - 2))
    return lengths


def dora_names(network: str, lengths: dict[str, torch.Tensor], *, end: str = "") -> dict[str, torch.Tensor]:
    """As diffusers and PEFT save magnitudes; with another end, `.weight`, as transformers finds those of its models."""
    return {f"{network}.{name}.lora_magnitude_vector{end}": length for name, length in lengths.items()}


def kohya_names(network: str, pairs: Pairs, *, alpha: float) -> dict[str, torch.Tensor]:
    """As kohya's scripts save it: dots become underscores, and an alpha is kept beside the factors."""
    tensors: dict[str, torch.Tensor] = {}
    prefix = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}[network]
    for name, (down, up) in pairs.items():
        flat = f"{prefix}_{name.replace('.', '_')}"
        tensors |= {
            f"{flat}.lora_down.weight": down,
            f"{flat}.lora_up.weight": up,
            f"{flat}.alpha": torch.tensor(alpha),
        }
    return tensors


def save_lora(
    store: Path,
    lora_id: str,
    tensors: dict[str, torch.Tensor],
    *,
    base_model: str | None = None,
    metadata: dict[str, str] | None = None,
) -> Path:
    """Writes one LoRA into a model store. Returns its file."""
    folder = store / lora_id
    folder.mkdir(parents=True)
    path = folder / "pytorch_lora_weights.safetensors"
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        path,
        metadata={"format": "pt", **(metadata or {})},
    )
    if base_model:
        (folder / "darkroom.json").write_text(json.dumps({"base_model": base_model}))
    return path


def denoiser_of(pipeline: DiffusionPipeline) -> tuple[str, torch.nn.Module]:
    """Its name and itself."""
    name = "unet" if hasattr(pipeline, "unet") else "transformer"
    return name, getattr(pipeline, name)


def save_lora_for(
    store: Path, lora_id: str, model: Path, *, seed: int, rank: int = 4, kohya: bool = False, dora: bool = False
) -> Path:
    """Writes a LoRA over many layers of a tiny model's denoiser. Returns its file."""
    name, network = denoiser_of(DiffusionPipeline.from_pretrained(model))
    pairs = factors(network, is_any, rank=rank, seed=seed)
    tensors = kohya_names(name, pairs, alpha=2.0) if kohya else diffusers_names(name, pairs)
    if dora:
        tensors |= dora_names(name, magnitudes(network, pairs, seed=seed))
    return save_lora(store, lora_id, tensors, base_model=model.name)
