"""The sides of bench.stepbatch, each in a process of its own: plain diffusers, and the executor in one order or other.

A side takes a stream of requests with their times of arrival, denoises them, and says when each was done, what its UNet
ran and for how long. Embeddings are there beforehand.
"""

import asyncio
import functools
import math
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import diffusers
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from bench.cost import CostProbe
from bench.stepbatch_mix import MODELS, SCHEDULERS, Wanted, lora_ids
from bench.stepbatch_orders import other_orders
from bench.stepbatch_profile import Ledger, watch_engine
from bench.stepbatch_store import EMBEDDINGS, NEGATIVE
from bench.worker import Answer, Question, answer_lines, worker_flags
from darkroom.models import executor
from darkroom.models.controlnets import ControlNets
from darkroom.models.ip_adapters import IpAdapters
from darkroom.models.remote import OutsideCall, Reply
from darkroom.models.replica import StageReplica
from darkroom.models.tensors import to_raw, to_torch
from darkroom.runtime.channels import Channels
from darkroom.runtime.exchange import TensorShelf, TensorSource
from darkroom.schedulers import scheduler_choice
from darkroom.wire.tasks import DenoiseTask, LoraUse
from services.denoiser.config import DenoiserConfig
from services.denoiser.denoising import Denoised, Denoising

_UNBOUNDED = 10_000
_CHECKPOINT_INTERVAL = 5
"""As the router asks; snapshots of this size then come after every step."""


@dataclass(slots=True)
class ForwardLog:
    """What every UNet of this process has run: counts and seconds by latent side and rows."""

    counts: Counter[tuple[int, int]] = field(default_factory=Counter)
    seconds: dict[tuple[int, int], float] = field(default_factory=dict)
    cpu_s: float = 0.0
    """Of the thread that runs them, in all."""

    def watch(self) -> None:
        """From now on. On the class: the copies that carry LoRAs are timed as well."""
        real = UNet2DConditionModel.forward

        @functools.wraps(real)
        def timed(network: Any, *args: Any, **kwargs: Any) -> Any:
            sample = args[0] if args else kwargs["sample"]
            start_s, start_cpu_s = time.perf_counter(), time.thread_time()
            answer = real(network, *args, **kwargs)
            self.cpu_s += time.thread_time() - start_cpu_s
            kind = (sample.shape[-1], len(sample))
            self.seconds[kind] = self.seconds.get(kind, 0.0) + time.perf_counter() - start_s
            self.counts[kind] += 1
            return answer

        UNet2DConditionModel.forward = timed

    def read(self) -> list[tuple[int, int, int, float]]:
        """Latent side, rows, count and seconds since the last reading."""
        read = [(*kind, count, self.seconds[kind]) for kind, count in sorted(self.counts.items())]
        self.counts.clear()
        self.seconds.clear()
        self.cpu_s = 0.0
        return read


@dataclass(frozen=True, slots=True)
class Served:
    """A stream's end: seconds from arrival to latents, and the latents, by the request's place in the stream."""

    latency_s: list[float]
    latents: list[torch.Tensor]


class Side(Protocol):
    """Whoever denoises a stream."""

    def serve(self, requests: Sequence[Wanted], arrivals_s: Sequence[float]) -> Served:
        """Denoises each request from its arrival on, in seconds from now."""


class PlainSide:
    """Plain diffusers, one request after another: everything stays loaded, and nothing is set up twice.

    Beside each pipeline stands one with the LoRAs in place, since requests without one would pay for them there.
    """

    def __init__(self, store: Path) -> None:
        """Loads both models, every LoRA and every scheduler."""
        self._embeddings = load_file(store / EMBEDDINGS)
        self._pipelines: dict[tuple[str, bool], Any] = {}
        self._schedulers: dict[tuple[str, str], Any] = {}
        for model_id in MODELS:
            for has_loras in (False, True):
                pipeline = StableDiffusionPipeline.from_pretrained(store / model_id, local_files_only=True)
                pipeline.set_progress_bar_config(disable=True)
                self._pipelines[model_id, has_loras] = pipeline
            for lora_id in lora_ids(model_id):
                pipeline.load_lora_weights(store / lora_id, adapter_name=lora_id)
            for name in SCHEDULERS:
                choice = scheduler_choice(name)
                kind = getattr(diffusers, choice.class_name)
                made = kind.from_config(pipeline.scheduler.config, **dict(choice.options))
                self._schedulers[model_id, name] = made

    def serve(self, requests: Sequence[Wanted], arrivals_s: Sequence[float]) -> Served:
        """In order of arrival."""
        start_s, served = time.monotonic(), Served([], [])
        for wanted, arrival_s in zip(requests, arrivals_s, strict=True):
            time.sleep(max(0.0, start_s + arrival_s - time.monotonic()))
            served.latents.append(self._denoise(wanted))
            served.latency_s.append(time.monotonic() - start_s - arrival_s)
        return served

    def _denoise(self, wanted: Wanted) -> torch.Tensor:
        pipeline = self._pipelines[wanted.model_id, bool(wanted.lora_id)]
        if wanted.lora_id:
            pipeline.set_adapters([wanted.lora_id], [wanted.lora_scale])
        pipeline.scheduler = self._schedulers[wanted.model_id, wanted.scheduler]
        with torch.inference_mode():
            latents: torch.Tensor = pipeline(
                prompt_embeds=self._embeddings[str(wanted.prompt)],
                negative_prompt_embeds=self._embeddings[NEGATIVE],
                num_inference_steps=wanted.step_count,
                guidance_scale=wanted.guidance_scale,
                width=wanted.side_px,
                height=wanted.side_px,
                generator=torch.Generator().manual_seed(wanted.seed),
                output_type="latent",
                return_dict=False,
            )[0]
        return latents


def _nowhere(stage: str, call: OutsideCall) -> "Future[Reply]":
    raise AssertionError(f"{call.network} of stage {stage} is not asked for here")


class ExecutorSide:
    """The denoiser as its service runs it, checks, events and checkpoints included: all but the RPC."""

    def __init__(self, store: Path, order: str, ledger: Ledger | None) -> None:
        """`order`: "darkroom", or one of the others. `ledger`: where the engine's time is to be booked."""
        self._requests: dict[str, Wanted] = {}
        self._stream = 0
        if order != "darkroom":
            vars(executor)["choose_batch"] = other_orders(self._requests)[order]
        if ledger:
            watch_engine(ledger)
        self._embeddings = {name: to_raw(tensor) for name, tensor in load_file(store / EMBEDDINGS).items()}
        # Not asyncio.Runner: it sets signal handlers, and in doing so prints the task with all its latents.
        self._loop = asyncio.new_event_loop()
        self._denoising = self._loop.run_until_complete(self._load(store, order))

    async def _load(self, store: Path, order: str) -> Denoising:
        config = DenoiserConfig(model_store=store)
        replica = StageReplica(
            replica_id="bench",
            stage="denoiser",
            model_store=store,
            device=config.device,
            max_running=_UNBOUNDED,
            max_batch_rows=config.max_batch_rows,
            thread_count=config.threads,
            # A batcher of whole requests sees the whole queue: slots would keep its company from it.
            slot_count=_UNBOUNDED if order.startswith("requests") else config.slots,
        )
        for model_id in MODELS:
            part = await replica.part(model_id)
            async with replica.adapted(part, [LoraUse(lora_id, 1.0) for lora_id in lora_ids(model_id)]):
                pass  # they stay loaded
        source = TensorSource(Channels(), TensorShelf(limit_bytes=0, inline_limit_bytes=0), set)
        controlnets = ControlNets(store, torch.device(config.device))
        return Denoising(replica, source, controlnets, IpAdapters(store, _nowhere))

    def serve(self, requests: Sequence[Wanted], arrivals_s: Sequence[float]) -> Served:
        """As the executor's order has it."""
        self._stream += 1  # ids are never used again: orders remember whom they batched
        self._requests.update({self._id(wanted): wanted for wanted in requests})
        return self._loop.run_until_complete(self._serve(requests, arrivals_s))

    def _id(self, wanted: Wanted) -> str:
        return f"{self._stream}-{wanted.number}"

    async def _serve(self, requests: Sequence[Wanted], arrivals_s: Sequence[float]) -> Served:
        start_s = asyncio.get_running_loop().time()
        pairs = zip(requests, arrivals_s, strict=True)
        done = await asyncio.gather(*(self._denoise(wanted, start_s + arrival_s) for wanted, arrival_s in pairs))
        return Served([latency_s for latency_s, _ in done], [latents for _, latents in done])

    async def _denoise(self, wanted: Wanted, arrival_s: float) -> tuple[float, torch.Tensor]:
        loop = asyncio.get_running_loop()
        await asyncio.sleep(arrival_s - loop.time())
        async for event in self._denoising.denoise(self._task(wanted), math.inf):
            if isinstance(event, Denoised):
                return loop.time() - arrival_s, to_torch(event.latents)
        raise AssertionError("the last event is always Denoised")

    def _task(self, wanted: Wanted) -> DenoiseTask:
        return DenoiseTask(
            request_id=self._id(wanted),
            model_id=wanted.model_id,
            embeddings={
                "prompt_embeds": self._embeddings[str(wanted.prompt)],
                "negative_prompt_embeds": self._embeddings[NEGATIVE],
            },
            width_px=wanted.side_px,
            height_px=wanted.side_px,
            step_count=wanted.step_count,
            guidance_scale=wanted.guidance_scale,
            seed=wanted.seed,
            image_count=1,
            scheduler=wanted.scheduler,
            deterministic=False,
            checkpoint_interval=_CHECKPOINT_INTERVAL,
            loras=(LoraUse(wanted.lora_id, wanted.lora_scale),) if wanted.lora_id else (),
        )


class _SizedProbe(CostProbe):
    """The cost curve at sizes of image other than the model's own."""

    _side = 0

    def measure(self, question: Question) -> Answer:
        """As the base class, at `latent_side`."""
        self._side = question["latent_side"]
        return super().measure(question)

    def _arguments(self, rows: int) -> dict[str, Any]:
        arguments = super()._arguments(rows)
        sample = arguments["sample"]
        return arguments | {"sample": torch.randn(rows, sample.shape[1], self._side, self._side, dtype=sample.dtype)}


class SideProcess:
    """Answers for one side, which its first question names."""

    def __init__(self, store: Path) -> None:
        self._store, self._log = store, ForwardLog()
        self._ledger: Ledger | None = None
        self._side: Side | None = None
        self._probe: CostProbe | None = None

    def answer(self, question: Question) -> Answer:
        """`prepare`, `serve` or `cost`, as the question's `do` says."""
        answer: Answer = getattr(self, question.pop("do"))(**question)
        return answer

    def prepare(self, side: str, *, is_profiled: bool = False) -> Answer:
        """Loads what the side needs."""
        self._log.watch()
        self._ledger = Ledger() if is_profiled else None
        if side == "plain":
            self._side = PlainSide(self._store)
        else:
            self._side = ExecutorSide(self._store, side, self._ledger)
        return {}

    def serve(self, requests: list[dict[str, Any]], arrivals_s: list[float], latents: str = "") -> Answer:
        """Serves a stream; its latents go to the file named, if one is."""
        assert self._side is not None
        self._log.read()
        if self._ledger:
            self._ledger.read()
        start_s, cpu_s, own_cpu_s = time.monotonic(), time.process_time(), time.thread_time()
        served = self._side.serve([Wanted(**wanted) for wanted in requests], arrivals_s)
        answer = {
            "whole_s": time.monotonic() - start_s,
            "cpu_s": time.process_time() - cpu_s,
            "loop_cpu_s": 0.0 if isinstance(self._side, PlainSide) else time.thread_time() - own_cpu_s,
            "network_cpu_s": self._log.cpu_s,
            "latency_s": served.latency_s,
            "forwards": self._log.read(),
            "booked": self._ledger.read() if self._ledger else {},
        }
        if latents:
            named = {str(number): latent.contiguous() for number, latent in enumerate(served.latents)}
            save_file(named, latents)
        return answer

    def cost(self, latent_side: int, rows: int, window_s: float) -> Answer:
        """Seconds of one forward of so many rows."""
        if self._probe is None:
            self._probe = _SizedProbe(self._store / MODELS[0], "cpu")
        with torch.inference_mode():
            return self._probe.measure({"latent_side": latent_side, "rows": rows, "window_s": window_s})


if __name__ == "__main__":
    given = worker_flags(__doc__)
    torch.set_num_threads(given.threads)
    answer_lines(SideProcess(given.folder).answer)
