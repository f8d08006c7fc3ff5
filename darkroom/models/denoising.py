"""The denoiser's program: the pipeline's own loop from embeddings to latents, every step of it in a journal."""

from collections.abc import Mapping

import torch

from darkroom.models.calls import call_arguments
from darkroom.models.journal import Journal, RangeDone
from darkroom.models.loader import Part
from darkroom.models.own import fresh_scheduler, own_copy
from darkroom.models.program import ProgramEnded, ProgramPushedOut
from darkroom.wire.tasks import DenoiseTask


def denoise(part: Part, task: DenoiseTask, embeddings: Mapping[str, torch.Tensor], journal: Journal) -> torch.Tensor:
    """Runs the pipeline from embeddings to latents [image_count, ...], in the layout of its `output_type="latent"`.

    Run again with the same journal, after it was pushed out, it goes on after the last step that was done. Raises
    InvalidCheckpoint when the journal starts from what does not fit.
    """
    pipeline = own_copy(part)
    pipeline.scheduler = fresh_scheduler(part.pipeline.scheduler, task.scheduler)
    generators = [torch.Generator().manual_seed(task.seed + i) for i in range(task.image_count)]
    journal.begin(pipeline.scheduler, generators, part.device)
    for name in part.denoiser_names:
        object.__setattr__(pipeline, name, journal.watch(getattr(part.pipeline, name), name))
    try:
        latents: torch.Tensor = pipeline(
            **call_arguments(
                part,
                embeddings,
                step_count=task.step_count,
                guidance_scale=task.guidance_scale,
                width_px=task.width_px,
                height_px=task.height_px,
                image_count=task.image_count,
            ),
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
