"""The denoiser on a CUDA device, against plain diffusers on the same device: `make gpu` runs it, others skip it."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from darkroom.models.checkpoints import to_checkpoint, to_snapshot
from darkroom.models.denoising import denoise
from darkroom.models.executor import Executor
from darkroom.models.journal import Journal, Snapshot, StepDone
from darkroom.models.loader import Part, load_part
from darkroom.models.program import Ticket
from tests.models.denoise_runs import Asked, embeddings_of
from tests.models.oracle import held_up

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")
MODELS = ("tiny-sd", "tiny-sdxl", "tiny-sd3", "tiny-flux")


def plainly(store: Path, part: Part, asked: Asked) -> torch.Tensor:
    pipeline = DiffusionPipeline.from_pretrained(store / asked.model_id, dtype=part.denoiser.dtype).to(CUDA)
    pipeline.set_progress_bar_config(disable=True)
    embeddings = {name: value.to(CUDA) for name, value in embeddings_of(part, asked.guidance_scale).items()}
    latents: torch.Tensor = pipeline(
        **embeddings,
        num_inference_steps=asked.step_count,
        guidance_scale=asked.guidance_scale,
        width=32,
        height=32,
        generator=torch.Generator().manual_seed(asked.seed),
        output_type="latent",
        return_dict=False,
    )[0]
    return latents


def run_all(part: Part, requests: list[Asked], *, alone: bool) -> list[tuple[torch.Tensor, Ticket]]:
    """All requests wait when the first one starts."""
    executor, runs = Executor(max_batch_rows=16), []
    with held_up(executor):
        for asked in requests:
            ticket = Ticket(alone=alone)
            program = partial(denoise, part, asked.task(), embeddings_of(part, asked.guidance_scale), Journal(ticket))
            runs.append((executor.submit(program, ticket=ticket)[0], ticket))
    try:
        return [(future.result(120), ticket) for future, ticket in runs]
    finally:
        executor.close()


def distance(found: torch.Tensor, right: torch.Tensor) -> float:
    return float((found.float() - right.float()).norm() / right.float().norm())


@pytest.mark.parametrize("model_id", MODELS)
def test_latents_match_plain_diffusers_on_the_device(tiny_store: Path, model_id: str) -> None:
    part = load_part(tiny_store, model_id, "denoiser", CUDA)
    requests = [Asked(model_id=model_id, seed=seed, step_count=6 + seed) for seed in range(4)]
    expected = [plainly(tiny_store, part, asked) for asked in requests]
    for (found, _), right in zip(run_all(part, requests, alone=True), expected, strict=True):
        assert found.device.type == "cuda"
        assert torch.equal(found, right)
    together = run_all(part, requests, alone=False)
    assert sum(ticket.batched for _, ticket in together) > 0
    for (found, _), right in zip(together, expected, strict=True):
        assert distance(found, right) <= 1e-3


@pytest.mark.parametrize("model_id", MODELS)
def test_a_run_goes_on_from_any_checkpoint_bit_for_bit_on_the_device(tiny_store: Path, model_id: str) -> None:
    part, asked = load_part(tiny_store, model_id, "denoiser", CUDA), Asked(model_id=model_id)
    task, executor, kept = asked.task(), Executor(max_batch_rows=16), dict[int, Snapshot]()

    def on_step(done: StepDone) -> None:
        assert done.snapshot is not None
        kept[done.step] = done.snapshot

    def run(journal: Journal) -> Any:
        program = partial(denoise, part, task, embeddings_of(part, asked.guidance_scale), journal)
        return executor.submit(program, ticket=journal.ticket)[0].result(120)

    whole = run(Journal(Ticket(alone=True), on_step=on_step, snapshot_interval=1))
    for snapshot in list(kept.values()):
        checkpoint = to_checkpoint(snapshot, epoch=0, task_digest=task.digest, device=CUDA)
        start = to_snapshot(checkpoint, task, CUDA)
        assert torch.equal(run(Journal(Ticket(alone=True), start=start)), whole)
    executor.close()


def test_the_cost_curve_is_learned_from_the_devices_own_clock(tiny_store: Path) -> None:
    part, asked = load_part(tiny_store, "tiny-sd", "denoiser", CUDA), Asked(step_count=20)
    executor, journal = Executor(max_batch_rows=16), Journal(Ticket())
    program = partial(denoise, part, asked.task(), embeddings_of(part, asked.guidance_scale), journal)
    for _ in range(2):
        executor.submit(program)[0].result(120)
        torch.cuda.synchronize()
    measured = [executor.costs.measured(key) for key in executor.costs._kinds]
    assert [list(sizes) for sizes in measured] == [[2]]
    assert 0 < measured[0][2] < 1
    executor.close()
