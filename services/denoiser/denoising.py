"""Embeddings to latents: one program per request, progress and checkpoints after its steps."""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from functools import partial

from darkroom.errors import Moved, StaleEpoch
from darkroom.models import checks
from darkroom.models.checkpoints import to_checkpoint, to_snapshot
from darkroom.models.controlnets import ControlNets
from darkroom.models.denoising import denoise, preview_of
from darkroom.models.ip_adapters import IpAdapters
from darkroom.models.journal import Journal, StepDone
from darkroom.models.loader import Part
from darkroom.models.program import Ticket
from darkroom.models.replica import StageReplica
from darkroom.models.tensors import to_raw, to_torch
from darkroom.models.variants import UNCONDITIONED, Conditions, check_conditions, read_conditions
from darkroom.runtime.exchange import TensorSource
from darkroom.wire.checkpoints import EVERY_STEP_LIMIT_BYTES, Checkpoint
from darkroom.wire.conditions import NO_CONDITIONS
from darkroom.wire.tasks import DenoiseTask
from darkroom.wire.tensors import RawTensor
from services.denoiser.attempts import Attempts

_ALIVE_INTERVAL_S = 1.0


@dataclass(frozen=True, slots=True)
class Step:
    """A solver step is done."""

    step: int
    step_count: int
    checkpoint: Checkpoint | None
    previews: tuple[bytes, ...] = ()
    """JPEG files, one per image."""


@dataclass(frozen=True, slots=True)
class Denoised:
    """The finished latents, and what they took."""

    latents: RawTensor
    forward_count: int
    batched_forward_count: int
    pushed_out_count: int
    cached_forward_count: int


@dataclass(frozen=True, slots=True)
class Alive:
    """Nothing happened for a while, and all is well."""

    started: bool


Event = Step | Denoised | Alive


class Denoising:
    """Denoises requests on one replica."""

    def __init__(
        self, replica: StageReplica, source: TensorSource, controlnets: ControlNets, ip_adapters: IpAdapters
    ) -> None:
        """Runs on `replica`; embeddings that came by ref are fetched through `source`."""
        self._replica, self._source = replica, source
        self._controlnets, self._ip_adapters = controlnets, ip_adapters
        self._attempts = Attempts()

    async def denoise(self, task: DenoiseTask, deadline_s: float) -> AsyncGenerator[Event, None]:
        """Steps as they are done, then the result. Closing the iterator ends the program within one step.

        `deadline_s` is on the clock of `time.monotonic`. Raises InvalidTensor, InvalidCheckpoint, UnknownHolder,
        TensorNotFound, DigestMismatch, QueueFull, ModelNotFound, UnusableModel, LoraNotFound, UnusableLora,
        UnusableCheckpoint, StaleEpoch, DeadlinePassed, Moved or Stalled.
        """
        events: asyncio.Queue[Step | None] = asyncio.Queue()
        work = asyncio.create_task(self._run(task, deadline_s, events))
        work.add_done_callback(lambda _: events.put_nowait(None))
        is_started = False
        try:
            while True:
                try:
                    async with asyncio.timeout(_ALIVE_INTERVAL_S):
                        event = await events.get()
                except TimeoutError:
                    yield Alive(is_started)
                    continue
                if event is None:
                    break
                is_started = True
                yield event
            yield await work
        finally:
            work.cancel()

    async def _run(self, task: DenoiseTask, deadline_s: float, events: "asyncio.Queue[Step | None]") -> Denoised:
        async with self._replica.accepted():
            part = await self._replica.part(task.model_id, task.loras)
            checks.check_request(part, task)
            part = await self._ip_adapters.adapted(part, [use.adapter_id for use in task.conditions.ip_adapters])
            raw = await self._source.bring_all(task.embeddings)
            embeddings = {name: to_torch(value) for name, value in raw.items()}
            checks.check_embeddings(part, task, embeddings)
            journal = _journal(task, part, deadline_s)
            loop, digest = asyncio.get_running_loop(), task.digest
            sent_step = journal.start.step if journal.start else 0  # the caller has that

            def send(done: StepDone) -> None:
                nonlocal sent_step
                checkpoint = None
                if done.snapshot:
                    sent_step = done.step
                    checkpoint = to_checkpoint(done.snapshot, epoch=task.epoch, task_digest=digest, device=part.device)
                events.put_nowait(Step(done.step, done.step_count, checkpoint, done.previews))

            def on_step(done: StepDone) -> None:
                loop.call_soon_threadsafe(send, done)

            journal.on_step = on_step
            conditions = await self._conditions(task, part)
            async with self._replica.adapted(part, task.loras, journal.ticket) as stand_ins:
                program = partial(denoise, part, task, embeddings, journal, stand_ins=stand_ins, conditions=conditions)
                work = asyncio.create_task(self._replica.run(program, journal.ticket))
                try:
                    with self._attempts.running(task.run_id, task.epoch, work):
                        latents = await work
                except Moved:
                    kept = journal.start
                    if kept is not None and kept.step > sent_step:
                        send(StepDone(kept.step, kept.step_count, kept, ()))
                    raise
                finally:
                    work.cancel()
            ticket = journal.ticket
            return Denoised(
                latents=to_raw(latents),
                forward_count=ticket.forwards,
                batched_forward_count=ticket.batched,
                pushed_out_count=ticket.pushed_out,
                cached_forward_count=journal.cached_forwards,
            )

    async def _conditions(self, task: DenoiseTask, part: Part) -> Conditions:
        asked = task.conditions
        if asked == NO_CONDITIONS:
            check_conditions(part, UNCONDITIONED, task.step_count)
            return UNCONDITIONED
        nets = [await self._controlnets.get(use.controlnet_id) for use in asked.controls]
        read = partial(read_conditions, part, asked, nets, width_px=task.width_px, height_px=task.height_px)
        conditions = await asyncio.to_thread(read)
        check_conditions(part, conditions, task.step_count)
        return conditions


def _journal(task: DenoiseTask, part: Part, deadline_s: float) -> Journal:
    if task.checkpoint is not None and task.checkpoint.epoch > task.epoch:
        raise StaleEpoch(str(task.epoch), str(task.checkpoint.epoch))
    start = to_snapshot(task.checkpoint, task, part.device) if task.checkpoint else None
    ticket = Ticket(
        request_id=task.request_id,
        tenant=task.tenant,
        priority=task.priority,
        deadline_s=deadline_s,
        alone=task.deterministic,
        restartable=True,
        movable=task.checkpoint_interval > 0,
        forwards_left=max(1, (task.to_step or task.step_count) - (start.step if start else 0)),
    )
    return Journal(
        ticket,
        snapshot_interval=task.checkpoint_interval,
        every_step_limit_bytes=EVERY_STEP_LIMIT_BYTES,
        start=start,
        takes_latents_only=task.from_step > 0,
        to_step=task.to_step,
        cache_threshold=task.step_cache_threshold,
        preview=preview_of(part, task),
        preview_interval=task.preview_interval,
    )
