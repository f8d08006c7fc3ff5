"""Denoising runs on tiny models for the tests of checkpoints: here, and in a process of their own."""

import base64
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import diffusers
import torch

from darkroom.models.checkpoints import to_checkpoint, to_snapshot
from darkroom.models.denoising import denoise
from darkroom.models.executor import Executor
from darkroom.models.journal import Journal, StepDone
from darkroom.models.loader import Part, load_part
from darkroom.models.program import Ticket
from darkroom.v1 import checkpoint_pb2
from darkroom.wire.checkpoints import Checkpoint, checkpoint_message, parse_checkpoint
from darkroom.wire.tasks import DenoiseTask

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What to denoise. `solver`: a class of diffusers and its options, in place of the model's own scheduler."""

    model_id: str = "tiny-sd"
    solver: str = ""
    options: str = "{}"
    step_count: int = 8
    guidance_scale: float = 4.0
    seed: int = 3
    image_count: int = 1
    from_step: int = 0
    to_step: int | None = None

    def task(self) -> DenoiseTask:
        return DenoiseTask(
            request_id="r",
            model_id=self.model_id,
            embeddings={},
            width_px=32,
            height_px=32,
            step_count=self.step_count,
            guidance_scale=self.guidance_scale,
            seed=self.seed,
            image_count=self.image_count,
            scheduler="",
            deterministic=True,
            from_step=self.from_step,
            to_step=self.to_step,
        )


@dataclass(frozen=True, slots=True)
class Run:
    """What a run left: latents, checkpoints by step, and forwards that it cost."""

    latents: torch.Tensor
    checkpoints: Mapping[int, bytes]
    forwards: int


@cache
def _part(store: Path, model_id: str) -> Part:
    return load_part(store, model_id, "denoiser", torch.device("cpu"))


@cache
def _engine() -> Executor:
    return Executor(max_batch_rows=16)


def embeddings_of(part: Part, guidance_scale: float) -> dict[str, torch.Tensor]:
    """Random embeddings of the right widths, the same in every process."""
    noise = torch.Generator().manual_seed(0)
    config = part.denoiser_config
    width = int(config.get("cross_attention_dim") or config["joint_attention_dim"])
    pooled: int = config.get("pooled_projection_dim") or 32
    guided = part.family.is_guided(guidance_scale)
    return {
        name: torch.randn(1, pooled, generator=noise) if "pooled" in name else torch.randn(1, 8, width, generator=noise)
        for name in part.family.embedding_names(guided=guided)
    }


def run(store: Path, asked: Asked, checkpoint: bytes | None = None) -> Run:
    """Runs it, from a checkpoint's bytes or from the start, with a checkpoint after every step."""
    part = _part(store, asked.model_id)
    if asked.solver:
        own = part.pipeline.scheduler
        other = getattr(diffusers, asked.solver).from_config(own.config, **json.loads(asked.options))
        pipeline = type(part.pipeline)(**{**part.pipeline.components, "scheduler": other})
        pipeline.set_progress_bar_config(disable=True)
        part = replace(part, pipeline=pipeline)
    task, checkpoints = asked.task(), {}
    start = to_snapshot(_parsed(checkpoint), task, part.device) if checkpoint else None

    def on_step(done: StepDone) -> None:
        if done.snapshot is not None:
            kept = to_checkpoint(done.snapshot, epoch=0, task_digest=task.digest, device=part.device)
            message = checkpoint_message(kept)
            checkpoints[done.step] = message.SerializeToString()

    journal = Journal(Ticket(alone=True), on_step=on_step, snapshot_interval=1, start=start, to_step=asked.to_step)
    journal.takes_latents_only = asked.from_step > 0
    embeddings = embeddings_of(part, asked.guidance_scale)
    future, ticket = _engine().submit(lambda: denoise(part, task, embeddings, journal), ticket=journal.ticket)
    return Run(future.result(60), checkpoints, ticket.forwards)


def _parsed(checkpoint: bytes) -> Checkpoint:
    return parse_checkpoint(checkpoint_pb2.Checkpoint.FromString(checkpoint))


class OtherProcess:
    """A process that runs what it is asked, over the same store."""

    def __init__(self, store: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.models.denoise_runs", str(store)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate()

    def run(self, asked: Asked, checkpoint: bytes | None) -> Run:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        fields = {name: getattr(asked, name) for name in asked.__dataclass_fields__}
        question = {"asked": fields, "checkpoint": base64.b64encode(checkpoint or b"").decode()}
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        latents = torch.frombuffer(bytearray(base64.b64decode(answer["latents"])), dtype=torch.float32)
        return Run(latents.reshape(answer["shape"]), {}, answer["forwards"])


def _answer_lines() -> None:
    store = Path(sys.argv[1])
    for line in sys.stdin:
        question = json.loads(line)
        done = run(store, Asked(**question["asked"]), base64.b64decode(question["checkpoint"]) or None)
        answer = {
            "latents": base64.b64encode(done.latents.numpy().tobytes()).decode(),
            "shape": list(done.latents.shape),
            "forwards": done.forwards,
        }
        print(json.dumps(answer), flush=True)  # noqa: T201 - this is how it answers


if __name__ == "__main__":
    _answer_lines()
