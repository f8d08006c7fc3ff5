"""From a prompt to the txt2img graph: the model's defaults filled in, everything checked against the catalogue."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from darkroom import __version__
from darkroom.errors import InvalidField, InvalidGraph, LoraNotFound, ModelNotFound, RegistryUnavailable
from darkroom.families import FAMILIES
from darkroom.registry.catalogue import CONTROLNET, IP_ADAPTER, ModelEntry
from darkroom.registry.membership import ClusterView
from darkroom.wire import fields
from darkroom.wire.conditions import NO_CONDITIONS, ConditionFiles
from darkroom.wire.graphs import DecodeWork, DenoiseWork, EncodeTextWork, Graph, make_graph
from darkroom.wire.tasks import LoraUse

_MAX_RANDOM_SEED = 1 << 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompted:
    """A checked request for images of a prompt; None where the model's default applies."""

    model_id: str
    prompt: str
    negative_prompt: str
    width_px: int | None
    height_px: int | None
    step_count: int | None
    guidance_scale: float | None
    seed: int | None
    image_count: int
    scheduler: str
    loras: tuple[LoraUse, ...] = ()
    step_cache_threshold: float = 0.0
    preview_interval: int = 0
    frame_count: int = 0
    conditions: ConditionFiles = NO_CONDITIONS


@dataclass(frozen=True, slots=True)
class Plan:
    """The graph to run, and the seed that was settled on."""

    graph: Graph
    seed: int


def plan_generation(request: Prompted, view: ClusterView) -> Plan:
    """The txt2img graph. Raises ModelNotFound, InvalidField, or RegistryUnavailable before the catalogue was read."""
    entry = _entry(request.model_id, view)
    width_px = entry.default_width_px if request.width_px is None else request.width_px
    height_px = entry.default_height_px if request.height_px is None else request.height_px
    step_count = entry.default_step_count if request.step_count is None else request.step_count
    scale = entry.default_guidance_scale if request.guidance_scale is None else request.guidance_scale
    seed = secrets.randbelow(_MAX_RANDOM_SEED) if request.seed is None else request.seed
    denoise = DenoiseWork(
        model_id=request.model_id,
        width_px=width_px,
        height_px=height_px,
        step_count=step_count,
        guidance_scale=scale,
        seed=seed,
        image_count=request.image_count,
        scheduler=request.scheduler,
        loras=request.loras,
        step_cache_threshold=request.step_cache_threshold,
        preview_interval=request.preview_interval,
        frame_count=request.frame_count,
        conditions=request.conditions,
    )
    _check_denoise(denoise, entry, view)
    _check_loras(request.loras, request.model_id, view)
    encode = EncodeTextWork(
        model_id=request.model_id,
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        guided=entry.is_guided(scale),
        loras=tuple(use for use in request.loras if _changes_encoder(use, view)),
    )
    decode = DecodeWork(model_id=request.model_id, parameters=_parameters(request, denoise, entry))
    graph = make_graph(
        {
            "encode": (encode, {}),
            "denoise": (denoise, {"embedding": "encode"}),
            "decode": (decode, {"latent": "denoise"}),
        }
    )
    return Plan(graph, seed)


def check_against_catalogue(graph: Graph, view: ClusterView) -> None:
    """Raises ModelNotFound or InvalidGraph unless every node's model exists and can do what the node asks."""
    for node in graph.nodes:
        entry = _entry(node.work.model_id, view)
        if isinstance(node.work, EncodeTextWork | DenoiseWork):
            try:
                _check_loras(node.work.loras, node.work.model_id, view)
                if isinstance(node.work, DenoiseWork):
                    _check_denoise(node.work, entry, view)
            except InvalidField as error:
                raise InvalidGraph(node.node_id, f"has a wrong field: {error.message}") from error


def _entry(model_id: str, view: ClusterView) -> ModelEntry:
    if not view.is_ready:
        raise RegistryUnavailable("the catalogue was not read yet")
    entry = view.model(model_id)
    if entry is None:
        raise ModelNotFound(model_id)
    return entry


def lora_scale(lora_id: str, view: ClusterView) -> float:
    """What the LoRA's owner says its scale should be."""
    entry = view.lora(lora_id)
    return 1.0 if entry is None else entry.default_scale


def _check_loras(loras: Sequence[LoraUse], model_id: str, view: ClusterView) -> None:
    """Raises LoraNotFound, or InvalidField for one that is made for another model."""
    for position, use in enumerate(loras):
        entry = view.lora(use.lora_id)
        if entry is None:
            raise LoraNotFound(f"loras[{position}].lora_id", use.lora_id)
        if entry.base_model not in (None, model_id):
            raise InvalidField(f"loras[{position}]", f"({use.lora_id}) is made for model {entry.base_model}")


def _changes_encoder(use: LoraUse, view: ClusterView) -> bool:
    entry = view.lora(use.lora_id)
    return entry is not None and "encoder" in entry.stages


def _check_guides(guide_ids: Sequence[str], field: str, role: str, model: ModelEntry, view: ClusterView) -> None:
    """Raises ModelNotFound, or InvalidField for one of another role, or that leads other models."""
    for position, guide_id in enumerate(guide_ids):
        entry = view.guide(guide_id)
        if entry is None:
            raise ModelNotFound(guide_id)
        if entry.role != role:
            raise InvalidField(f"{field}[{position}]", f"({guide_id}) is no {role} but a {entry.role}")
        if FAMILIES.get(model.pipeline) and model.pipeline not in entry.pipelines:
            raise InvalidField(f"{field}[{position}]", f"({guide_id}) leads no {model.pipeline}")
        if entry.base_model not in (None, model.model_id):
            raise InvalidField(f"{field}[{position}]", f"({guide_id}) is made for model {entry.base_model}")


def _check_denoise(work: DenoiseWork, entry: ModelEntry, view: ClusterView) -> None:
    conditions = work.conditions
    _check_guides([use.controlnet_id for use in conditions.controls], "controls", CONTROLNET, entry, view)
    _check_guides([use.adapter_id for use in conditions.ip_adapters], "ip_adapters", IP_ADAPTER, entry, view)
    fields.check_size(work.width_px, work.height_px, entry.size_multiple_px)
    fields.check_pixels(work.width_px, work.height_px, work.image_count)
    fields.check_scheduler(work.scheduler, entry.schedulers)


def _parameters(request: Prompted, work: DenoiseWork, entry: ModelEntry) -> dict[str, str]:
    """What is written into the image file: enough to draw it again."""
    own = entry.schedulers[0] if entry.schedulers else "the model's own"
    return {
        "software": f"Darkroom {__version__}",
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "model": work.model_id,
        "seed": str(work.seed),
        "steps": str(work.step_count),
        "guidance_scale": f"{work.guidance_scale:g}",
        "scheduler": work.scheduler or own,
        "size": f"{work.width_px}x{work.height_px}",
        **({"loras": ", ".join(f"{use.lora_id}:{use.scale:g}" for use in work.loras)} if work.loras else {}),
        **({"step_cache": f"{work.step_cache_threshold:g}"} if work.step_cache_threshold else {}),
    }
