"""Requests with images, masks and ControlNets: in the denoiser's program, and in plain diffusers."""

import inspect
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from transformers import SiglipImageProcessor, SiglipVisionModel

from darkroom.models.controlnets import load_controlnet
from darkroom.models.executor import Executor
from darkroom.models.image_encoders import load_image_encoder, load_pixel_maker
from darkroom.models.ip_adapters import with_ip_adapters
from darkroom.models.loader import Part, load_part
from darkroom.models.networks import call_network
from darkroom.models.remote import OutsideCall, Reply
from darkroom.models.variants import Conditions, Control, ip_prompt
from tests.models.oracle import CPU, NEGATIVE, SIZE_PX, Wanted, denoise_task, encoded
from tests.tiny.ip_adapters import IP_ADAPTERS, WEIGHTS


def picture(seed: int, mode: str = "RGB", size: tuple[int, int] = (SIZE_PX, SIZE_PX)) -> Image.Image:
    """Smooth noise: an image like any other, to a VAE that was never trained."""
    noise = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size).convert(mode)


def mask(seed: int = 0) -> Image.Image:
    """White on one side."""
    drawn = Image.new("L", (SIZE_PX, SIZE_PX), 0)
    drawn.paste(255, (0, 0, SIZE_PX // 2 + 4 * seed, SIZE_PX))
    return drawn


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is asked of a model: `pictures` names among image, mask; `controls` are ids of ControlNets."""

    model_id: str
    plain: str
    """The class of diffusers that does it."""
    image: bool = False
    mask: bool = False
    strength: float | None = None
    controls: tuple[str, ...] = ()
    scales: tuple[float, ...] = (0.75, 0.5)
    ends: tuple[float, ...] = (1.0, 0.6)
    ip_adapters: tuple[str, ...] = ()
    ip_scales: tuple[float, ...] = (0.8, 0.5)

    def conditions(self, store: Path, seed: int, send: Any = None) -> Conditions:
        """As the denoiser gets them; `send`: ControlNets are elsewhere."""
        return Conditions(
            image=picture(seed) if self.image else None,
            mask=mask(seed) if self.mask else None,
            strength=self.strength,
            controls=tuple(
                Control(
                    net=_controlnet(store, name, send),
                    picture=picture(seed + 10 + i),
                    scale=self.scales[i],
                    end=self.ends[i],
                )
                for i, name in enumerate(self.controls)
            ),
            ip_prompts=tuple(
                ip_prompt(_reader(store, name), prompt, self.ip_scales[i])
                for i, (name, prompt) in enumerate(zip(self.ip_adapters, self.prompts(seed), strict=True))
            ),
        )

    def prompts(self, seed: int) -> list[Image.Image]:
        """The pictures for its IP-Adapters."""
        return [picture(seed + 20 + i, size=(40, 56)) for i in range(len(self.ip_adapters))]

    def part(self, store: Path, send: Any = None) -> Part:
        """The denoiser's part; `send` calls networks of other stages."""
        part = part_of(store, self.model_id, "denoiser", send)
        return with_ip_adapters(part, store, self.ip_adapters, send) if self.ip_adapters else part


SD, XL = "StableDiffusion", "StableDiffusionXL"
CASES = {
    "sd image": Case(model_id="tiny-sd", plain=f"{SD}Img2ImgPipeline", image=True, strength=0.6),
    "sd inpaint": Case(model_id="tiny-sd", plain=f"{SD}InpaintPipeline", image=True, mask=True, strength=0.7),
    "sd inpaint all": Case(model_id="tiny-sd", plain=f"{SD}InpaintPipeline", image=True, mask=True),
    "sd inpaint 9": Case(model_id="tiny-sd-inpaint", plain=f"{SD}InpaintPipeline", image=True, mask=True, strength=1.0),
    "sd control": Case(model_id="tiny-sd", plain=f"{SD}ControlNetPipeline", controls=("control-sd",)),
    "sd 2 controls": Case(
        model_id="tiny-sd", plain=f"{SD}ControlNetPipeline", controls=("control-sd", "control-sd-other")
    ),
    "sd image control": Case(
        model_id="tiny-sd", plain=f"{SD}ControlNetImg2ImgPipeline", image=True, strength=0.6, controls=("control-sd",)
    ),
    "sd inpaint control": Case(
        model_id="tiny-sd",
        plain=f"{SD}ControlNetInpaintPipeline",
        image=True,
        mask=True,
        strength=0.6,
        controls=("control-sd",),
    ),
    "xl image": Case(model_id="tiny-sdxl", plain=f"{XL}Img2ImgPipeline", image=True, strength=0.6),
    "xl refiner": Case(model_id="tiny-sdxl-refiner", plain=f"{XL}Img2ImgPipeline", image=True, strength=0.6),
    "xl inpaint": Case(model_id="tiny-sdxl", plain=f"{XL}InpaintPipeline", image=True, mask=True, strength=0.8),
    "xl control": Case(model_id="tiny-sdxl", plain=f"{XL}ControlNetPipeline", controls=("control-sdxl",)),
    "xl image control": Case(
        model_id="tiny-sdxl",
        plain=f"{XL}ControlNetImg2ImgPipeline",
        image=True,
        strength=0.6,
        controls=("control-sdxl",),
    ),
    "xl inpaint control": Case(
        model_id="tiny-sdxl",
        plain=f"{XL}ControlNetInpaintPipeline",
        image=True,
        mask=True,
        strength=0.6,
        controls=("control-sdxl",),
    ),
    "sd3 image": Case(model_id="tiny-sd3", plain=f"{SD}3Img2ImgPipeline", image=True, strength=0.6),
    "sd3 inpaint": Case(model_id="tiny-sd3-wide", plain=f"{SD}3InpaintPipeline", image=True, mask=True, strength=0.6),
    "flux image": Case(model_id="tiny-flux", plain="FluxImg2ImgPipeline", image=True, strength=0.6),
    "flux inpaint": Case(model_id="tiny-flux", plain="FluxInpaintPipeline", image=True, mask=True, strength=0.6),
    "flux control": Case(model_id="tiny-flux", plain="FluxControlNetPipeline", controls=("control-flux",)),
    "flux 2 controls": Case(
        model_id="tiny-flux", plain="FluxControlNetPipeline", controls=("control-flux", "control-flux-other")
    ),
    "flux image control": Case(
        model_id="tiny-flux",
        plain="FluxControlNetImg2ImgPipeline",
        image=True,
        strength=0.6,
        controls=("control-flux",),
    ),
    "flux inpaint control": Case(
        model_id="tiny-flux",
        plain="FluxControlNetInpaintPipeline",
        image=True,
        mask=True,
        strength=0.6,
        controls=("control-flux",),
    ),
    "qwen image": Case(model_id="tiny-qwen-image", plain="QwenImageImg2ImgPipeline", image=True, strength=0.6),
    "qwen inpaint": Case(
        model_id="tiny-qwen-image", plain="QwenImageInpaintPipeline", image=True, mask=True, strength=0.6
    ),
    "qwen control": Case(model_id="tiny-qwen-image", plain="QwenImageControlNetPipeline", controls=("control-qwen",)),
    "sd ip": Case(model_id="tiny-sd", plain=f"{SD}Pipeline", ip_adapters=("ip-sd",)),
    "sd ip plus": Case(model_id="tiny-sd", plain=f"{SD}Pipeline", ip_adapters=("ip-sd-plus",)),
    "sd 2 ip": Case(model_id="tiny-sd", plain=f"{SD}Pipeline", ip_adapters=("ip-sd", "ip-sd-plus")),
    "sd inpaint control ip": Case(
        model_id="tiny-sd",
        plain=f"{SD}ControlNetInpaintPipeline",
        image=True,
        mask=True,
        strength=0.6,
        controls=("control-sd",),
        ip_adapters=("ip-sd",),
    ),
    "xl ip": Case(model_id="tiny-sdxl", plain=f"{XL}Pipeline", ip_adapters=("ip-sdxl",)),
    "xl control ip": Case(
        model_id="tiny-sdxl",
        plain=f"{XL}ControlNetPipeline",
        controls=("control-sdxl",),
        ip_adapters=("ip-sdxl",),
    ),
    "sd3 ip": Case(model_id="tiny-sd3", plain=f"{SD}3Pipeline", ip_adapters=("ip-sd3",)),
    "sd3 image ip": Case(
        model_id="tiny-sd3", plain=f"{SD}3Img2ImgPipeline", image=True, strength=0.6, ip_adapters=("ip-sd3",)
    ),
    "flux ip": Case(model_id="tiny-flux", plain="FluxPipeline", ip_adapters=("ip-flux",)),
    "flux image ip": Case(
        model_id="tiny-flux", plain="FluxImg2ImgPipeline", image=True, strength=0.6, ip_adapters=("ip-flux",)
    ),
    "flux 2 ip": Case(model_id="tiny-flux", plain="FluxPipeline", ip_adapters=("ip-flux", "ip-flux-other")),
    "flux image 2 ip": Case(
        model_id="tiny-flux",
        plain="FluxImg2ImgPipeline",
        image=True,
        strength=0.6,
        ip_adapters=("ip-flux", "ip-flux-other"),
    ),
    "z image": Case(model_id="tiny-z-image", plain="ZImageImg2ImgPipeline", image=True, strength=0.6),
    "z inpaint": Case(model_id="tiny-z-image", plain="ZImageInpaintPipeline", image=True, mask=True, strength=0.6),
}
REQUESTS = (Wanted("a red circle", 1, 5, 4.0), Wanted("a ring", 2, 6, 5.0), Wanted("a red circle", 3, 5, 3.0))


@cache
def _controlnet(store: Path, name: str, send: Any) -> Any:
    return load_controlnet(store, name, CPU, send=send)


@cache
def _reader(store: Path, adapter_id: str) -> Any:
    return load_pixel_maker(store, adapter_id, load_image_encoder(store, adapter_id, CPU).network)


class Elsewhere:
    """Calls networks of parts in an executor of its own: the other replica, without the wire."""

    def __init__(self, store: Path) -> None:
        self._store, self.executor = store, Executor(max_batch_rows=16)
        self.calls: list[str] = []

    def send(self, stage: str, call: OutsideCall) -> "Future[Reply]":
        held: Any
        if stage == "controlnet":
            held = _controlnet(self._store, call.model_id, None)
        elif call.model_id in IP_ADAPTERS:
            held = load_image_encoder(self._store, call.model_id, CPU)
        else:
            held = part_of(self._store, call.model_id, stage)
        future, _ = self.executor.submit(lambda: call_network(held, call), alone=call.alone)
        self.calls.append(f"{stage}.{call.network}.{call.method}")
        return future


@cache
def part_of(store: Path, model_id: str, stage: str, send: Any = None) -> Part:
    return load_part(store, model_id, stage, CPU, send=send)


def plain_latents(
    store: Path, case: Case, wanted: Wanted, part: Part, *, image_count: int = 1, dtype: torch.dtype = torch.float32
) -> Any:
    """The latents that diffusers makes, each image of a request with its own row and noise."""
    kind = getattr(diffusers, case.plain)
    whole = DiffusionPipeline.from_pretrained(store / case.model_id, dtype=dtype)
    parameters = inspect.signature(kind).parameters
    components = {name: value for name, value in {**whole.config, **whole.components}.items() if name in parameters}
    conditions = case.conditions(store, wanted.seed)
    nets = [control.net.network for control in conditions.controls]
    if nets:
        components["controlnet"] = nets if len(nets) > 1 else nets[0]
    pipeline = kind(**components)
    pipeline.set_progress_bar_config(disable=True)
    if case.ip_adapters:
        load_plainly(pipeline, store, case)
    generators = [torch.Generator().manual_seed(wanted.seed + i) for i in range(image_count)]
    accepted = inspect.signature(kind.__call__).parameters
    given: dict[str, Any] = {
        "prompt": wanted.prompt,
        "negative_prompt": NEGATIVE,
        "num_images_per_prompt": image_count,
        part.family.guidance: wanted.guidance,
        "num_inference_steps": wanted.steps,
        "generator": generators if image_count > 1 else generators[0],
        "output_type": "latent",
        "return_dict": False,
        **_plain_pictures(conditions, accepted, image_count),
        **_plain_prompts(case.prompts(wanted.seed), accepted),
        **dict.fromkeys(("width", "height"), SIZE_PX),
    }
    return pipeline(**{name: value for name, value in given.items() if name in accepted})[0]


def load_plainly(pipeline: Any, store: Path, case: Case) -> None:
    """Gives a pipeline of diffusers the case's IP-Adapters."""
    folders = [str(store / adapter_id) for adapter_id in case.ip_adapters]
    several = not isinstance(pipeline, diffusers.loaders.SD3IPAdapterMixin)
    encoder: dict[str, Any] = {"image_encoder_folder": "image_encoder"}
    if isinstance(pipeline, diffusers.loaders.FluxIPAdapterMixin):
        encoder = {
            "image_encoder_pretrained_model_name_or_path": folders[0],
            "image_encoder_subfolder": "image_encoder",
            "image_encoder_dtype": pipeline.dtype,
        }
    if several:
        pipeline.load_ip_adapter(folders, subfolder="", weight_name=[WEIGHTS] * len(folders), **encoder)
        scales = list(case.ip_scales[: len(folders)])
        pipeline.set_ip_adapter_scale(scales if len(scales) > 1 else scales[0])
    else:
        folder = store / case.ip_adapters[0] / "image_encoder"
        network, reader = (kind.from_pretrained(folder) for kind in (SiglipVisionModel, SiglipImageProcessor))
        network.to(pipeline.dtype)
        pipeline.register_modules(image_encoder=network, feature_extractor=reader)  # it looks for them on the internet
        pipeline.load_ip_adapter(folders[0], weight_name=WEIGHTS, subfolder="", **encoder)
        pipeline.set_ip_adapter_scale(case.ip_scales[0])


def _plain_prompts(pictures: list[Image.Image], accepted: Mapping[str, Any]) -> dict[str, Any]:
    if not pictures:
        return {}
    given: dict[str, Any] = {"ip_adapter_image": pictures if len(pictures) > 1 else pictures[0]}
    if len(pictures) > 1 and "negative_ip_adapter_image" in accepted:
        # what Flux takes by default, but for each adapter: its image to image has it for one only
        given["negative_ip_adapter_image"] = [np.zeros((SIZE_PX, SIZE_PX, 3), dtype=np.uint8)] * len(pictures)
    return given


def _plain_pictures(conditions: Conditions, accepted: Mapping[str, Any], count: int) -> dict[str, Any]:
    given: dict[str, Any] = {}
    if conditions.image:
        given["image"] = [conditions.image] * count
    if conditions.mask:
        given["mask_image"] = [conditions.mask] * count
    if conditions.strength is not None:
        given["strength"] = conditions.strength
    controls = conditions.controls
    if controls:
        name = "control_image" if "control_image" in accepted else "image"
        given[name] = [control.picture for control in controls]
        given["controlnet_conditioning_scale"] = [control.scale for control in controls]
        given["control_guidance_end"] = [control.end for control in controls]
        given["control_guidance_start"] = [control.start for control in controls]
    if len(controls) == 1:
        given |= {key: value[0] for key, value in given.items() if key.startswith("control") or key == name}
    return given


def requested(store: Path, case: Case, wanted: Wanted, executor: Executor, part: Part) -> tuple[Any, Any]:
    """Task and embeddings."""
    embeddings = encoded(executor, part_of(store, case.model_id, "encoder"), wanted)
    return denoise_task(part, wanted), embeddings
