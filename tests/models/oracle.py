"""Plain diffusers beside the stages: the same model, prompts, seeds, steps and guidance in one process."""

import contextlib
import inspect
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from darkroom.models import checks, programs
from darkroom.models.denoising import denoise
from darkroom.models.executor import Executor
from darkroom.models.journal import Journal
from darkroom.models.loader import Part, load_part
from darkroom.models.program import Ticket
from darkroom.models.tensors import to_raw, to_torch
from darkroom.wire.tasks import DecodeTask, DenoiseTask, EncodeTask
from darkroom.wire.tensors import RawTensor

CPU = torch.device("cpu")
SIZE_PX = 32
NEGATIVE = "a star"


@dataclass(frozen=True, slots=True)
class Wanted:
    """One request."""

    prompt: str
    seed: int
    steps: int
    guidance: float


REQUESTS = (
    Wanted("a red circle", 0, 3, 3.5),
    Wanted("a large blue star on a white background", 1, 4, 3.5),
    Wanted("a red circle", 2, 5, 6.0),
    Wanted("a ring", 3, 3, 1.0),
)
"""The first and third can share batches in every family, whatever its texts' lengths."""


def parts(store: Path, model_id: str) -> tuple[Part, Part, Part]:
    encoder, denoiser, vae = (load_part(store, model_id, stage, CPU) for stage in ("encoder", "denoiser", "vae"))
    return encoder, denoiser, vae


def encode_task(part: Part, wanted: Wanted) -> EncodeTask:
    return EncodeTask(
        request_id="r",
        model_id=part.model_id,
        prompt=wanted.prompt,
        negative_prompt=NEGATIVE,
        guided=part.family.is_guided(wanted.guidance),
        deterministic=False,
    )


def denoise_task(part: Part, wanted: Wanted) -> DenoiseTask:
    return DenoiseTask(
        request_id="r",
        model_id=part.model_id,
        embeddings={},
        width_px=SIZE_PX,
        height_px=SIZE_PX,
        step_count=wanted.steps,
        guidance_scale=wanted.guidance,
        seed=wanted.seed,
        image_count=1,
        scheduler="",
        deterministic=False,
    )


def decode_task(part: Part) -> DecodeTask:
    return DecodeTask(
        request_id="r",
        model_id=part.model_id,
        latents=RawTensor("float32", (), b""),
        width_px=SIZE_PX,
        height_px=SIZE_PX,
        parameters={},
        deterministic=False,
    )


class Plain:
    """The whole pipeline, as diffusers loads and runs it."""

    def __init__(self, store: Path, model_id: str, part: Part, *, dtype: torch.dtype = torch.float32) -> None:
        self._pipeline = DiffusionPipeline.from_pretrained(store / model_id, dtype=dtype)
        self._pipeline.set_progress_bar_config(disable=True)
        self._family = part.family

    def _run(self, wanted: Wanted, output_type: str, **more: object) -> Any:
        options = dict(self._family.options)
        if "negative_prompt" in inspect.signature(self._pipeline.__call__).parameters:
            options["negative_prompt"] = NEGATIVE
        return self._pipeline(
            wanted.prompt,
            **options,
            **{self._family.guidance: wanted.guidance},
            num_inference_steps=wanted.steps,
            width=SIZE_PX,
            height=SIZE_PX,
            output_type=output_type,
            return_dict=False,
            **{"generator": torch.Generator().manual_seed(wanted.seed), **more},
        )[0]

    def latents(self, wanted: Wanted, **more: object) -> torch.Tensor:
        """`more`: arguments of the call beside those that every request has."""
        latents: torch.Tensor = self._run(wanted, "latent", **more)
        return latents

    def frames(self, wanted: Wanted) -> list[Image.Image]:
        """The image, or the video's frames."""
        row = self._run(wanted, "pil")[0]
        return row if isinstance(row, list) else [row]


def encoded(executor: Executor, part: Part, wanted: Wanted) -> dict[str, torch.Tensor]:
    """Embeddings, as the denoiser gets them over the wire."""
    answer = executor.submit(partial(programs.encode, part, encode_task(part, wanted)), alone=True)[0].result(60)
    return {name: to_torch(to_raw(tensor)) for name, tensor in answer.items()}


@contextlib.contextmanager
def held_up(executor: Executor) -> Iterator[None]:
    """Nothing that is submitted inside starts before all of it is there."""
    is_holding, gate = threading.Event(), threading.Event()

    def hold() -> None:
        is_holding.set()
        gate.wait(60)

    executor.submit(hold)
    assert is_holding.wait(60)
    try:
        yield
    finally:
        gate.set()


def denoised(
    executor: Executor, part: Part, requests: Sequence[tuple[Wanted, dict[str, torch.Tensor]]], *, alone: bool
) -> list[tuple[torch.Tensor, Ticket]]:
    """Latents of requests that all wait when the first one starts."""
    runs = []
    with held_up(executor):
        for wanted, embeddings in requests:
            task, ticket = denoise_task(part, wanted), Ticket(alone=alone)
            checks.check_request(part, task)
            checks.check_embeddings(part, task, embeddings)
            program = partial(denoise, part, task, embeddings, Journal(ticket))
            runs.append((executor.submit(program, ticket=ticket)[0], ticket))
    return [(future.result(60), ticket) for future, ticket in runs]


@dataclass(frozen=True, slots=True)
class Comparison:
    """How far the stages are from plain diffusers."""

    batched_error: float
    """Largest relative error of the latents of any request that shared batches."""
    batched_share: float
    """Forwards that shared a batch, of all."""
    is_equal_alone: bool
    """Whether the latents of every request that ran alone are equal bit for bit."""
    prompt_effect: float
    """How much another prompt changes the latents: an error far below it would show if requests were mixed up."""
    pixel_difference: int
    """Largest difference of any channel of any pixel, of 255."""
    frame_count: int


def compare(store: Path, model_id: str) -> Comparison:
    """Runs the requests apart, together and alone, and in plain diffusers."""
    encoder, denoiser, vae = parts(store, model_id)
    plain = Plain(store, model_id, denoiser)
    executor = Executor(max_batch_rows=16)
    try:
        requests = [(wanted, encoded(executor, encoder, wanted)) for wanted in REQUESTS]
        expected = [plain.latents(wanted) for wanted in REQUESTS]
        together = denoised(executor, denoiser, requests, alone=False)
        apart = denoised(executor, denoiser, requests[:3], alone=True)
        latents, task = together[0][0], decode_task(vae)
        checks.check_latents(vae, task, latents)
        frames = executor.submit(partial(programs.decode, vae, task, latents))[0].result(60)
    finally:
        executor.close()
    other = plain.latents(replace(REQUESTS[0], prompt=REQUESTS[1].prompt))
    wanted_frames = plain.frames(REQUESTS[0])
    return Comparison(
        batched_error=max(_error(run[0], right) for run, right in zip(together, expected, strict=True)),
        batched_share=sum(ticket.batched for _, ticket in together) / sum(ticket.forwards for _, ticket in together),
        is_equal_alone=all(torch.equal(run[0], right) for run, right in zip(apart, expected, strict=False)),
        prompt_effect=_error(other, expected[0]),
        pixel_difference=max(_difference(*pair) for pair in zip(frames, wanted_frames, strict=True)),
        frame_count=len(frames),
    )


def _error(found: torch.Tensor, right: torch.Tensor) -> float:
    return float((found - right).norm() / right.norm())


def _difference(one: Image.Image, other: Image.Image) -> int:
    return int(np.abs(np.asarray(one).astype(int) - np.asarray(other).astype(int)).max())
