"""Tiny IP-Adapters with random weights, for the tiny models and in the formats that people publish."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.models.embeddings import IPAdapterPlusImageProjection, IPAdapterTimeImageProjection
from safetensors.torch import save_file
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

Tensors = dict[str, torch.Tensor]
IMAGE_WIDTH, TOKENS, PICTURE_PX = 24, 4, 32
_STRENGTH = 0.3


def _noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape) * _STRENGTH


def _projection(width: int) -> Tensors:
    """From an image embedding to a few tokens."""
    return {
        "image_proj.proj.weight": _noise(TOKENS * width, IMAGE_WIDTH),
        "image_proj.proj.bias": _noise(TOKENS * width),
        "image_proj.norm.weight": torch.ones(width),
        "image_proj.norm.bias": _noise(width),
    }


def _unet_attention(unet: Any) -> Tensors:
    tensors: Tensors = {}
    for position, (name, module) in enumerate(unet.attn_processors.items()):
        assert module
        if name.endswith("attn2.processor"):
            layer = unet.get_submodule(name.removesuffix(".processor"))
            for letter in "kv":
                shape = (layer.inner_dim, unet.config.cross_attention_dim)
                tensors[f"ip_adapter.{position}.to_{letter}_ip.weight"] = _noise(*shape)
    return tensors


def of_unet(pipeline: Any) -> Tensors:
    """The first kind: one embedding of the whole picture."""
    return _projection(pipeline.unet.config.cross_attention_dim) | _unet_attention(pipeline.unet)


def plus_of_unet(pipeline: Any) -> Tensors:
    """The kind called plus: a resampler over the image encoder's hidden states."""
    width = pipeline.unet.config.cross_attention_dim
    resampler = IPAdapterPlusImageProjection(
        embed_dims=IMAGE_WIDTH, output_dims=width, hidden_dims=64, dim_head=64, heads=1, num_queries=TOKENS
    )
    tensors = {}
    for name, value in resampler.state_dict().items():
        renamed = name.replace(".ln0.", ".0.norm1.").replace(".ln1.", ".0.norm2.").replace(".attn.to_", ".0.to_")
        renamed = (
            renamed.replace("0.to_out.0.", "0.to_out.").replace(".ff.0.", ".1.0.").replace(".ff.1.net.0.proj.", ".1.1.")
        )
        tensors[f"image_proj.{renamed.replace('.ff.1.net.2.', '.1.3.')}"] = value
    for name in [name for name in tensors if ".to_k." in name]:
        tensors[name.replace("to_k", "to_kv")] = torch.cat(
            [tensors.pop(name), tensors.pop(name.replace("to_k", "to_v"))]
        )
    return tensors | _unet_attention(pipeline.unet)


def of_flux(pipeline: Any) -> Tensors:
    """As published for Flux: other names for the same."""
    transformer = pipeline.transformer
    tensors = {
        name.replace("image_proj.", "ip_adapter_proj_model."): value
        for name, value in _projection(transformer.config.joint_attention_dim).items()
    }
    for block in range(transformer.config.num_layers):
        for letter in "kv":
            name = f"double_blocks.{block}.processor.ip_adapter_double_stream_{letter}_proj"
            tensors[f"{name}.weight"] = _noise(transformer.inner_dim, transformer.config.joint_attention_dim)
            tensors[f"{name}.bias"] = _noise(transformer.inner_dim)
    return tensors


def of_sd3(pipeline: Any) -> Tensors:
    """As published for SD3: a resampler that sees the timestep, norms of its own."""
    transformer = pipeline.transformer
    width, head, steps = transformer.inner_dim, transformer.config.attention_head_dim, 64
    resampler = IPAdapterTimeImageProjection(
        embed_dim=IMAGE_WIDTH, output_dim=width, hidden_dim=steps, heads=1, num_queries=TOKENS, timestep_in_dim=32
    )
    tensors = {f"image_proj.{name}": value for name, value in resampler.state_dict().items()}
    for block in range(len(transformer.attn_processors)):
        own = {
            "norm_ip.linear.weight": _noise(2 * width, steps),
            "norm_ip.linear.bias": _noise(2 * width),
            "to_k_ip.weight": _noise(width, width),
            "to_v_ip.weight": _noise(width, width),
            **{f"{norm}.weight": torch.ones(head) for norm in ("norm_q", "norm_k", "norm_ip_k")},
        }
        tensors |= {f"ip_adapter.{block}.{name}": value for name, value in own.items()}
    return tensors


def _clip() -> Any:
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=IMAGE_WIDTH,
            intermediate_size=37,
            projection_dim=IMAGE_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=PICTURE_PX,
            patch_size=8,
        )
    )


def _siglip() -> Any:
    return SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=IMAGE_WIDTH,
            intermediate_size=37,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=PICTURE_PX,
            patch_size=8,
        )
    )


IP_ADAPTERS: dict[str, tuple[str, Callable[[Any], Tensors], Callable[[], Any]]] = {
    "ip-sd": ("tiny-sd", of_unet, _clip),
    "ip-sd-plus": ("tiny-sd", plus_of_unet, _clip),
    "ip-sdxl": ("tiny-sdxl", of_unet, _clip),
    "ip-flux": ("tiny-flux", of_flux, _clip),
    "ip-flux-other": ("tiny-flux", of_flux, _clip),
    "ip-sd3": ("tiny-sd3", of_sd3, _siglip),
}
"""By id: the model it is for, its weights, its image encoder."""
WEIGHTS = "ip_adapter.safetensors"


def save_ip_adapter(root: Path, adapter_id: str) -> None:
    """Writes one into the model store, beside its model; equal ids give equal weights."""
    model_id, make, encoder = IP_ADAPTERS[adapter_id]
    torch.manual_seed(0)
    network = encoder()
    network.save_pretrained(root / adapter_id / "image_encoder", safe_serialization=True)
    if encoder is _siglip:  # published with it, as CLIP's is not
        size = dict.fromkeys(("width", "height"), PICTURE_PX)
        SiglipImageProcessor(size=size).save_pretrained(root / adapter_id / "image_encoder")
    torch.manual_seed(sum(adapter_id.encode()))
    tensors = make(DiffusionPipeline.from_pretrained(root / model_id))
    save_file({name: value.contiguous() for name, value in tensors.items()}, root / adapter_id / WEIGHTS)
