"""The denoiser's program: the pipeline's own loop from embeddings to latents, every step of it in a journal."""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

import torch

from darkroom.models.calls import call_arguments
from darkroom.models.ip_adapters import WithScales
from darkroom.models.journal import Journal, RangeDone
from darkroom.models.loader import Part
from darkroom.models.own import fresh_scheduler, own_copy
from darkroom.models.previews import unpack_patches
from darkroom.models.program import ProgramEnded, ProgramPushedOut
from darkroom.models.remote import calling_for
from darkroom.models.spaces import spatial_factor, temporal_factor
from darkroom.models.variants import UNCONDITIONED, Conditions, condition_arguments, control_network, variant
from darkroom.wire.tasks import DenoiseTask

_NO_STAND_INS: Mapping[str, torch.nn.Module] = MappingProxyType({})


def denoise(
    part: Part,
    task: DenoiseTask,
    embeddings: Mapping[str, torch.Tensor],
    journal: Journal,
    *,
    stand_ins: Mapping[str, torch.nn.Module] = _NO_STAND_INS,
    conditions: Conditions = UNCONDITIONED,
) -> torch.Tensor:
    """Runs the pipeline from embeddings to latents [image_count, ...], in the layout of its `output_type="latent"`.

    `stand_ins`: what to put in place of the part's own, by component; `conditions`: pictures to start from or follow.
    Run again with the same journal, after it was pushed out, it goes on after the last step that was done. Raises
    InvalidCheckpoint when the journal starts from what does not fit.
    """
    shared = variant(part, conditions)
    pipeline = own_copy(part, stand_ins, shared)
    pipeline.scheduler = fresh_scheduler(part.pipeline.scheduler, task.scheduler)
    generators = [torch.Generator().manual_seed(task.seed + i) for i in range(task.image_count)]
    journal.begin(pipeline.scheduler, generators, part.device, pipeline)
    for name in part.denoiser_names:
        network = journal.watch(getattr(pipeline, name), name)
        if conditions.ip_prompts:
            network = WithScales(network, part, [prompt.scale for prompt in conditions.ip_prompts])
        object.__setattr__(pipeline, name, network)
    if conditions.controls:
        object.__setattr__(pipeline, "controlnet", control_network(part, conditions, journal))
    kind = type(shared)
    arguments = call_arguments(
        part,
        embeddings,
        step_count=task.step_count,
        guidance_scale=task.guidance_scale,
        width_px=task.width_px,
        height_px=task.height_px,
        image_count=task.image_count,
        frame_count=task.frame_count,
        kind=kind,
        has_image=conditions.image is not None,
    ) | condition_arguments(kind, conditions, task.image_count)
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
    except (ProgramPushedOut, ProgramEnded):
        journal.keep()
        raise
    return latents


def preview_of(part: Part, task: DenoiseTask) -> Callable[[torch.Tensor], list[bytes]] | None:
    """What draws the request's latents, one file per image; None where the model has no map, or another layout."""
    if part.preview_map is None:
        return None
    if part.family.latents in ("BCHW", "BCTHW"):
        return part.preview_map.draw
    if (part.family.latents, part.family.latent_patch, temporal_factor(part)) != ("BSC", 2, 1):
        return None
    factor = spatial_factor(part)
    unpack = partial(unpack_patches, height=task.height_px // factor, width=task.width_px // factor)
    return partial(part.preview_map.draw, unpack=unpack)
