"""Requests with images, masks and ControlNets: in the denoiser's program, and in plain diffusers."""

import copy
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

from darkroom.models.calls import call_arguments
from darkroom.models.controlnets import load_controlnet
from darkroom.models.executor import Executor
from darkroom.models.journal import Journal, RangeDone
from darkroom.models.loader import Part, load_part
from darkroom.models.networks import call_network
from darkroom.models.own import fresh_scheduler
from darkroom.models.remote import OutsideCall, Reply, calling_for
from darkroom.models.variants import Conditions, Control, condition_arguments, control_network, variant
from darkroom.wire.tasks import DenoiseTask
from tests.models.oracle import CPU, NEGATIVE, SIZE_PX, Wanted, denoise_task, encoded


LOOPS: list[Any] = []
"""The pipeline objects of all runs so far."""


def picture(seed: int, mode: str = "RGB") -> Image.Image:
    """Smooth noise: an image like any other, to a VAE that was never trained."""
    noise = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((SIZE_PX, SIZE_PX)).convert(mode)


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
                )  # fmt: skip
                for i, name in enumerate(self.controls)
            ),
        )


@cache
def _controlnet(store: Path, name: str, send: Any) -> Any:
    return load_controlnet(store, name, CPU, send=send)


class Elsewhere:
    """Calls networks of parts in an executor of its own: the other replica, without the wire."""

    def __init__(self, store: Path) -> None:
        self._store, self.executor = store, Executor(max_batch_rows=16)
        self.calls: list[str] = []

    def send(self, stage: str, call: OutsideCall) -> "Future[Reply]":
        self.calls.append(f"{stage}.{call.network}.{call.method}")
        held: Any = (
            _controlnet(self._store, call.model_id, None)
            if stage == "controlnet"
            else part_of(self._store, call.model_id, stage)
        )
        return self.executor.submit(lambda: call_network(held, call), alone=call.alone)[0]


@cache
def part_of(store: Path, model_id: str, stage: str, send: Any = None) -> Part:
    return load_part(store, model_id, stage, CPU, send=send)


def plain_latents(store: Path, case: Case, wanted: Wanted, part: Part, scheduler: Any, image_count: int) -> Any:
    """The latents that diffusers makes, each image of a request with its own row and noise."""
    kind = getattr(diffusers, case.plain)
    whole = DiffusionPipeline.from_pretrained(store / case.model_id)
    parameters = inspect.signature(kind).parameters
    components = {name: value for name, value in {**whole.config, **whole.components}.items() if name in parameters}
    conditions = case.conditions(store, wanted.seed)
    nets = [control.net.network for control in conditions.controls]
    if nets:
        components["controlnet"] = nets if len(nets) > 1 else nets[0]
    pipeline = kind(**components | ({"scheduler": scheduler} if scheduler else {}))
    pipeline.set_progress_bar_config(disable=True)
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
        **dict.fromkeys(("width", "height"), SIZE_PX),
    }
    return pipeline(**{name: value for name, value in given.items() if name in accepted})[0]


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


def denoise_variant(
    part: Part, task: DenoiseTask, embeddings: Mapping[str, torch.Tensor], journal: Journal, conditions: Conditions
) -> torch.Tensor:
    """The denoiser's program under conditions."""
    shared = variant(part, conditions)
    pipeline = copy.copy(shared)
    LOOPS.append(pipeline)
    pipeline.scheduler = fresh_scheduler(part.pipeline.scheduler, task.scheduler)
    generators = [torch.Generator().manual_seed(task.seed + i) for i in range(task.image_count)]
    journal.begin(pipeline.scheduler, generators, part.device)
    for name in part.denoiser_names:
        object.__setattr__(pipeline, name, journal.watch(getattr(pipeline, name), name))
    if conditions.controls:
        object.__setattr__(pipeline, "controlnet", control_network(part, conditions, journal))
    arguments = call_arguments(
        part,
        embeddings,
        step_count=task.step_count,
        guidance_scale=task.guidance_scale,
        width_px=task.width_px,
        height_px=task.height_px,
        image_count=task.image_count,
        kind=type(shared),
    ) | condition_arguments(type(shared), conditions, task.image_count)
    try:
        with calling_for(journal.ticket):
            latents: torch.Tensor = pipeline(
                **arguments,
                generator=generators[0] if task.image_count == 1 else generators,
                output_type="latent",
                return_dict=False,
            )[0]
    except RangeDone as done:
        return done.latents
    return latents
