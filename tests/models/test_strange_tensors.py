"""Whatever tensors a stage is given for whichever family: it denoises and decodes them, or refuses them by name."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from darkroom.errors import InvalidTensor
from darkroom.models import checks, denoising, programs
from darkroom.models.executor import Executor
from darkroom.models.journal import Journal
from darkroom.models.loader import load_part
from darkroom.models.program import Ticket
from darkroom.models.spaces import latent_shape
from darkroom.wire.tasks import DecodeTask, DenoiseTask, EncodeTask
from darkroom.wire.tensors import RawTensor
from tests.tiny_models import TINY_MODELS

Change = Callable[[torch.Tensor], torch.Tensor]
CHANGES: dict[str, Change] = {
    "half": torch.Tensor.half,
    "bfloat16": torch.Tensor.bfloat16,
    "whole": torch.Tensor.int,
    "narrow": lambda tensor: tensor[..., :-1],
    "wide": lambda tensor: torch.cat([tensor, tensor], dim=-1),
    "another dimension": lambda tensor: tensor[None],
    "a dimension less": lambda tensor: tensor[0],
    "no dimension": torch.Tensor.sum,
    "two rows": lambda tensor: torch.cat([tensor, tensor]),
    "one token": lambda tensor: tensor[:, :1],
    "more tokens": lambda tensor: torch.cat([tensor, tensor], dim=1),
    "transposed": lambda tensor: tensor.transpose(-1, -2) if tensor.ndim > 1 else tensor,
    "not finite": lambda tensor: tensor * math.nan,
    "huge": lambda tensor: tensor * 1e30,
}
CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")  # diffusers' own


def denoise_task(model_id: str) -> DenoiseTask:
    return DenoiseTask(
        request_id="r",
        model_id=model_id,
        embeddings={},
        width_px=32,
        height_px=32,
        step_count=2,
        guidance_scale=3.0,
        seed=0,
        image_count=1,
        scheduler="",
        deterministic=False,
    )


def refused_tensor(check: Callable[[], None]) -> str | None:
    """The tensor that the check refuses, if it does."""
    try:
        check()
    except InvalidTensor as error:
        return error.facts["tensor"]
    return None


def text_of(name: str) -> str:
    """The embedding that a mask or a negative belongs to."""
    return name.removeprefix("negative_").replace("attention_mask", "embeds")


@pytest.mark.parametrize("model_id", TINY_MODELS)
def test_strange_embeddings_are_denoised_or_refused(tiny_store: Path, model_id: str) -> None:
    encoder, denoiser = (load_part(tiny_store, model_id, stage, CPU) for stage in ("encoder", "denoiser"))
    executor, task = Executor(max_batch_rows=16), denoise_task(model_id)
    request = EncodeTask(
        request_id="r",
        model_id=model_id,
        prompt="a ring",
        negative_prompt="",
        guided=encoder.family.is_guided(task.guidance_scale),
        deterministic=False,
    )
    good = executor.submit(lambda: programs.encode(encoder, request))[0].result()
    outcomes: dict[str, set[str]] = {}
    for change, apply in CHANGES.items():
        for name in good:
            embeddings = {**good, name: apply(good[name])}
            check = partial(checks.check_embeddings, denoiser, task, embeddings)
            refused = refused_tensor(check)
            if "mask" not in name:
                outcomes.setdefault(change, set()).add("refused" if refused else "denoised")
            if refused:
                assert text_of(refused) == text_of(name)
                continue
            program = partial(denoising.denoise, denoiser, task, embeddings, Journal(Ticket()))
            assert executor.submit(program)[0].result().shape[0] == 1
    executor.close()
    assert all(outcomes[change] == {"refused"} for change in ("whole", "narrow", "wide", "two rows", "not finite"))
    assert all(outcomes[change] == {"denoised"} for change in ("half", "bfloat16"))


@pytest.mark.parametrize("model_id", TINY_MODELS)
def test_strange_latents_are_decoded_or_refused(tiny_store: Path, model_id: str) -> None:
    vae = load_part(tiny_store, model_id, "vae", CPU)
    executor = Executor(max_batch_rows=16)
    task = DecodeTask(
        request_id="r",
        model_id=model_id,
        latents=RawTensor("float32", (), b""),
        width_px=32,
        height_px=32,
        parameters={},
        deterministic=False,
    )
    good = torch.zeros(1, *latent_shape(vae, 32, 32))
    for change, apply in CHANGES.items():
        latents = apply(good)
        refused = refused_tensor(partial(checks.check_latents, vae, task, latents))
        if refused:
            assert refused == "latents"
            assert change not in ("half", "bfloat16", "two rows")
            continue
        assert len(executor.submit(partial(programs.decode_rows, vae, task, latents))[0].result()) == len(latents)
    executor.close()
