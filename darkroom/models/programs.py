"""The programs of the encoder and the VAE: the pipeline's own code, with what another stage does done or left out.

Each takes a loaded `Part` and a checked task; each runs inside the executor, where network calls are batched. The
denoiser's program is in `denoising`.
"""

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from PIL import Image

from darkroom.models.calls import call_arguments, encode_arguments, named_embeddings
from darkroom.models.loader import Part
from darkroom.models.own import fresh_scheduler, own_copy
from darkroom.models.spaces import frame_count_of
from darkroom.wire.tasks import DecodeTask, EncodeTask

_NO_STAND_INS: Mapping[str, torch.nn.Module] = MappingProxyType({})


def encode(
    part: Part, task: EncodeTask, stand_ins: Mapping[str, torch.nn.Module] = _NO_STAND_INS
) -> dict[str, torch.Tensor]:
    """Runs `encode_prompt`. Returns embeddings [1, ...] by the names under which the pipeline's call takes them.

    `stand_ins`: what to put in place of the part's own, by component.
    """
    wanted = part.family.embedding_names(guided=task.guided)
    named: dict[str, torch.Tensor] = {}
    pipeline = own_copy(part, stand_ins)
    for encoding in part.family.encodings:
        if encoding.of_negative and not task.guided:
            continue
        arguments = encode_arguments(
            part,
            prompt=task.negative_prompt if encoding.of_negative else task.prompt,
            negative_prompt=task.negative_prompt,
            guided=task.guided,
        )
        named |= named_embeddings(encoding.returns, pipeline.encode_prompt(**arguments | dict(encoding.arguments)))
    return {name: value for name, value in named.items() if name in wanted}


def decode(part: Part, task: DecodeTask, latents: torch.Tensor) -> list[Image.Image]:
    """Runs the pipeline's tail on latents [n, ...]. Returns n images; of a video, all its frames (see `decode_rows`).

    Frames of several videos come one video after the other.
    """
    return [frame for frames in decode_rows(part, task, latents) for frame in frames]


def decode_rows(part: Part, task: DecodeTask, latents: torch.Tensor) -> list[list[Image.Image]]:
    """Runs the pipeline's tail on latents [n, ...]. Returns n lists: one image each, or the frames of a video.

    The tail is one step with an absent denoiser, whose solver answers with the finished latents.
    """
    pipeline = own_copy(part)
    scheduler = fresh_scheduler(part.pipeline.scheduler, "")
    finished = latents.to(part.device, torch.float32 if part.family.single_latents else part.pipeline.vae.dtype)
    # some pipelines take the second item: the solver's prediction of the finished latents
    scheduler.step = functools.wraps(scheduler.step)(lambda *_args, **_kwargs: (finished, finished))
    pipeline.scheduler = scheduler
    rows: list[Any] = pipeline(
        **call_arguments(
            part,
            _placeholders(part),
            step_count=1,
            guidance_scale=0.0,
            width_px=task.width_px,
            height_px=task.height_px,
            image_count=len(latents),
            frame_count=frame_count_of(part, task, latents),
        ),
        output_type="pil",
        return_dict=False,
    )[0]
    return [row if isinstance(row, list) else [row] for row in rows]


def _placeholders(part: Part) -> dict[str, torch.Tensor]:
    """Embeddings of one zero each, where the pipeline wants some but no network reads them."""
    return {
        name: torch.zeros(1, 1, device=part.device)
        if "pooled" in name or "mask" in name
        else torch.zeros(1, 1, 1, device=part.device)
        for name in part.family.embedding_names(guided=False)
    }
