"""The pipelines of other tasks over a loaded part: from an image, inside a mask, led by ControlNets.

diffusers has a class for each task of a family, all over the same components, and tables of which class is which. An
own copy of the variant is what a request runs in place of the part's pipeline; nothing else about the request changes.
"""

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.auto_pipeline import (
    AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
    AUTO_INPAINT_PIPELINES_MAPPING,
    AUTO_TEXT2IMAGE_PIPELINES_MAPPING,
)
from PIL import Image
from torch.utils._pytree import tree_map_only

from darkroom.errors import InvalidField
from darkroom.models.controlnets import ControlNet, together
from darkroom.models.journal import Journal
from darkroom.models.loader import Part
from darkroom.models.pictures import decode_picture
from darkroom.models.standins import StandIn
from darkroom.wire.conditions import ConditionFiles

_TABLES = (AUTO_TEXT2IMAGE_PIPELINES_MAPPING, AUTO_IMAGE2IMAGE_PIPELINES_MAPPING, AUTO_INPAINT_PIPELINES_MAPPING)
_WITH_CONTROLS = "-controlnet"
_BLACK_SIZE = (32, 32)  # black is black at any size


@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    """A ControlNet as a request uses it."""

    net: ControlNet
    picture: Image.Image
    """RGB, of the size that is drawn."""
    scale: float = 1.0
    """Factor of what it adds."""
    start: float = 0.0
    """Share of the steps after which it begins."""
    end: float = 1.0
    """Share of the steps after which it ends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IpPrompt:
    """A picture as a prompt, for one of the IP-Adapters of the part that draws."""

    pixels: torch.Tensor
    """[1, 3, H, W], as the image encoder takes them."""
    black: torch.Tensor
    """Of a black picture: what some pipelines take where there is no picture."""
    scale: float = 1.0
    """Factor of what it adds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """The pictures that a request starts from or is led by, all but prompts of the size that is drawn."""

    image: Image.Image | None = None
    """RGB."""
    mask: Image.Image | None = None
    """Greyscale: white is drawn anew, black is kept."""
    strength: float | None = None
    """Share of the steps that are done, from the image with as much noise; None means what the pipeline does."""
    controls: tuple[Control, ...] = ()
    ip_prompts: tuple[IpPrompt, ...] = ()
    """One for each of the part's IP-Adapters, in their order."""


UNCONDITIONED = Conditions()


def read_conditions(
    part: Part, files: ConditionFiles, nets: Sequence[ControlNet], *, width_px: int, height_px: int
) -> Conditions:
    """The conditions of a request for this size, its files decoded; `nets` are those of its controls, in order.

    `part` has the request's IP-Adapters. All that takes time is done here, on a thread beside the engine's. Raises
    InvalidField naming the file that is no picture of this size.
    """
    size, read = (width_px, height_px), getattr(part.pipeline, "feature_extractor", None)
    return Conditions(
        image=decode_picture("image", files.image, size, "RGB") if files.image else None,
        mask=decode_picture("mask", files.mask, size, "L") if files.mask else None,
        strength=files.strength,
        controls=tuple(
            Control(
                net=net,
                picture=decode_picture(f"controls[{position}].image", use.image, size, "RGB"),
                scale=use.scale,
                start=use.start,
                end=use.end,
            )
            for position, (use, net) in enumerate(zip(files.controls, nets, strict=True))
        ),
        ip_prompts=tuple(
            ip_prompt(read, decode_picture(f"ip_adapters[{position}].image", use.image, None, "RGB"), use.scale)
            for position, use in enumerate(files.ip_adapters)
        ),
    )


def ip_prompt(read: Any, picture: Image.Image, scale: float) -> IpPrompt:
    """The picture, RGB and of any size, as a prompt; `read` is the part's feature extractor."""
    pixels, black = (
        read(image, return_tensors="pt").pixel_values for image in (picture, Image.new("RGB", _BLACK_SIZE))
    )
    return IpPrompt(pixels=pixels, black=black, scale=scale)


def variant(part: Part, conditions: Conditions) -> DiffusionPipeline:
    """The pipeline for these conditions, shared by requests; the part's own where there are none.

    Raises InvalidField naming `image`, `mask` or `controls` when the model's family has no such pipeline.
    """
    kind = variant_class(type(part.pipeline), conditions)
    if kind is type(part.pipeline):
        return part.pipeline
    made = part.variants.get(kind)
    if made is None:
        made = part.variants[kind] = _made(part, kind)
    return made


def variant_class(own: type, conditions: Conditions) -> type:
    """The class that draws under these conditions what the pipeline class `own` draws without. Raises as `variant`."""
    whole, from_image, masked = _TABLES
    if conditions.mask is not None:
        table, needed, field = masked, {"image", "mask_image"}, "mask"
    elif conditions.image is not None:
        table, needed, field = from_image, {"image", "strength"}, "image"
    else:
        table, needed, field = whole, set(), "controls"
    if conditions.controls:
        if conditions.image is None and own in from_image.values():
            raise InvalidField("controls", "need an image with this model")
        needed, field = needed | {"controlnet_conditioning_scale"}, "controls"
    elif not needed:
        return own
    key = next((key for table in _TABLES for key, kind in table.items() if kind is own), "")
    kind = table.get(key + _WITH_CONTROLS * bool(conditions.controls))
    if kind is None or not needed <= _parameters(kind.__call__).keys():
        raise InvalidField(field, f"cannot be used with this model: {own.__name__} has no such variant")
    assert isinstance(kind, type)
    return kind


def _made(part: Part, kind: type) -> DiffusionPipeline:
    """Made the plain way: diffusers' `from_pipe` casts the components, which are shared."""
    own = part.pipeline
    available = {**own.config, **own.components}
    pipeline = kind(
        **{name: available[name] for name in _parameters(kind) if name in available},
        **{name: None for name in _parameters(kind) if name == "controlnet"},
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _parameters(function: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function).parameters


def condition_arguments(kind: type, conditions: Conditions, image_count: int) -> dict[str, Any]:
    """What a variant of this class is called with beside what every pipeline is.

    Each of several images has a row of its own, so that it draws noise for its image from its own source.
    """
    accepted = _parameters(kind.__call__)
    arguments: dict[str, Any] = {}
    if conditions.image is not None:
        arguments["image"] = [conditions.image] * image_count
        if conditions.strength is not None:
            arguments["strength"] = conditions.strength
    if conditions.mask is not None:
        arguments["mask_image"] = [conditions.mask] * image_count
    if conditions.controls:
        pictures = "control_image" if "control_image" in accepted else "image"
        arguments |= {
            pictures: _one_or_all([control.picture for control in conditions.controls]),
            "controlnet_conditioning_scale": _one_or_all([control.scale for control in conditions.controls]),
            "control_guidance_start": _one_or_all([control.start for control in conditions.controls]),
            "control_guidance_end": _one_or_all([control.end for control in conditions.controls]),
        }
    if conditions.ip_prompts:
        arguments["ip_adapter_image"] = _one_or_all([prompt.pixels for prompt in conditions.ip_prompts])
        if "negative_ip_adapter_image" in accepted:  # as is the default, but for each adapter
            arguments["negative_ip_adapter_image"] = [prompt.black for prompt in conditions.ip_prompts]
    return arguments


def _one_or_all(values: list[Any]) -> Any:
    return values[0] if len(values) == 1 else values


def control_network(part: Part, conditions: Conditions, journal: Journal) -> torch.nn.Module:
    """What stands for the ControlNets in one request's pipeline: a network of its loop, which the journal watches.

    Several are one to the journal: what stands for them adds their answers in place, which blank ones do not allow.
    """
    nets = [Scaled(control.net.face) for control in conditions.controls]
    kind = conditions.controls[0].net.kind
    network = nets[0] if len(nets) == 1 else together(nets, kind, dtype=part.denoiser.dtype, device=part.device)
    return journal.watch(network, "controlnet")


class Scaled(StandIn):
    """A ControlNet whose answer is multiplied outside of the batch: calls with different scales can share one.

    The product is the same, bit for bit: ControlNets multiply last of all. Those that pool their answers do not, and
    are left to do it themselves.
    """

    def forward(self, *args: Any, conditioning_scale: float = 1.0, **kwargs: Any) -> Any:
        """The network's answer."""
        network = self.__dict__["network"]
        if kwargs.get("guess_mode") or getattr(network.config, "global_pool_conditions", False):
            return network(*args, conditioning_scale=conditioning_scale, **kwargs)
        answer = network(*args, conditioning_scale=1.0, **kwargs)
        return tree_map_only(torch.Tensor, lambda residual: residual * conditioning_scale, answer)


def check_conditions(part: Part, conditions: Conditions, step_count: int) -> None:
    """Raises InvalidField unless the model can draw under these conditions, each of which is sound by itself."""
    for position, control in enumerate(conditions.controls):
        problem = control.net.misfit(part)
        if problem:
            raise InvalidField(f"controls[{position}]", f"({control.net.model_id}) {problem}")
    if conditions.mask is None and part.denoiser_config.get("in_channels", 0) > _channels(part):
        raise InvalidField("mask", "is missing: this model draws only inside one")
    kind = variant_class(type(part.pipeline), conditions)
    if conditions.ip_prompts and "ip_adapter_image" not in _parameters(kind.__call__):
        raise InvalidField("ip_adapters", f"cannot be used with the other conditions: {kind.__name__} takes none")
    if conditions.image is None:
        return
    strength = conditions.strength
    if strength is None:
        strength = float(_parameters(kind.__call__)["strength"].default)
    if int(step_count * strength) < 1:
        raise InvalidField("strength", f"of {strength} leaves none of {step_count} steps")


def _channels(part: Part) -> float:
    """Channels of the model's latents, as the VAE says; an inpainting UNet takes more."""
    channels: int | None = getattr(part.pipeline.vae.config, "latent_channels", None)
    return math.inf if channels is None or part.family.latents != "BCHW" else channels
