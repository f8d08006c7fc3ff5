"""Embeddings to latents: one program per request, progress after each step."""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from darkroom.models import checks, denoising
from darkroom.models.replica import StageReplica
from darkroom.models.tensors import to_raw, to_torch
from darkroom.runtime.exchange import TensorSource
from darkroom.wire.tasks import DenoiseTask
from darkroom.wire.tensors import RawTensor


@dataclass(frozen=True, slots=True)
class StepDone:
    """A solver step is done."""

    step: int
    step_count: int


@dataclass(frozen=True, slots=True)
class Denoised:
    """The finished latents, and what they took."""

    latents: RawTensor
    forward_count: int
    batched_forward_count: int


class Denoising:
    """Denoises requests on one replica."""

    def __init__(self, replica: StageReplica, source: TensorSource) -> None:
        """Runs on `replica`; embeddings that came by ref are fetched through `source`."""
        self._replica, self._source = replica, source

    async def denoise(self, task: DenoiseTask) -> AsyncGenerator[StepDone | Denoised, None]:
        """Steps as they are done, then the result. Closing the iterator ends the program within one step.

        Raises InvalidTensor, UnknownHolder, TensorNotFound, DigestMismatch, QueueFull, ModelNotFound or UnusableModel.
        """
        async with self._replica.accepted():
            part = await self._replica.part(task.model_id)
            raw = await self._source.bring_all(task.embeddings)
            embeddings = {name: to_torch(value) for name, value in raw.items()}
            checks.check_request(part, task)
            checks.check_embeddings(part, task, embeddings)
            loop = asyncio.get_running_loop()
            steps: asyncio.Queue[StepDone | None] = asyncio.Queue()

            def on_step(step: int, step_count: int) -> None:
                loop.call_soon_threadsafe(steps.put_nowait, StepDone(step, step_count))

            work = asyncio.create_task(
                self._replica.run(lambda: denoising.denoise(part, task, embeddings, on_step), alone=task.deterministic)
            )
            work.add_done_callback(lambda _: steps.put_nowait(None))
            try:
                while (step := await steps.get()) is not None:
                    yield step
                latents, counts = await work
                yield Denoised(to_raw(latents), counts.forwards, counts.batched)
            finally:
                work.cancel()
