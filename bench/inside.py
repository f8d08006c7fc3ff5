"""The stages' own programs in one process, without gRPC: what separates the cost of programs from the cost of services.

The same executor, stand-ins and programs as in the services; embeddings and latents pass by hand.
"""

import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.stopwatch import Stopwatch
from bench.worker import Answer, Question, answer_lines, worker_flags
from darkroom.models import denoising, programs
from darkroom.models.executor import Executor
from darkroom.models.journal import Journal
from darkroom.models.loader import Part, load_part
from darkroom.models.program import Ticket
from darkroom.wire.tasks import DecodeTask, DenoiseTask, EncodeTask
from darkroom.wire.tensors import RawTensor

_NO_TENSOR = RawTensor("float32", (0,), b"")


class InsidePipeline:
    """The three parts of a model, run one after another by one executor."""

    def __init__(self, folder: Path, device: str, threads: int) -> None:
        """On a GPU no network is timed by itself: its calls return before its work is done."""
        self._executor = Executor(max_batch_rows=32, thread_count=threads)
        self._model_id = folder.name
        self._parts = {
            stage: load_part(folder.parent, folder.name, stage, torch.device(device))
            for stage in ("encoder", "denoiser", "vae")
        }
        self._stopwatch = Stopwatch()
        if device == "cpu":
            self._stopwatch.watch(self._parts["denoiser"].networks["unet"], "forward", "unet")

    def draw(self, task: Question) -> Answer:
        """Draws a task. Returns seconds by stage."""
        encoder, denoiser, vae = self._parts.values()
        encode, denoise, decode = _works(self._model_id, task, denoiser)
        times: Answer = {}
        embeddings = self._time(times, "encode_s", lambda: programs.encode(encoder, encode))
        latents = self._time(
            times, "denoise_s", lambda: denoising.denoise(denoiser, denoise, embeddings, Journal(Ticket()))
        )
        images = self._time(times, "decode_s", lambda: programs.decode(vae, decode, latents))
        start_s = time.perf_counter()
        images[0].save(io.BytesIO(), format="PNG")
        return times | {"png_s": time.perf_counter() - start_s} | self._stopwatch.read()

    def _time(self, times: Answer, name: str, program: Callable[[], Any]) -> Any:
        start_s = time.perf_counter()
        answer = self._executor.submit(program)[0].result()
        times[name] = time.perf_counter() - start_s
        return answer


def _works(model_id: str, task: Question, denoiser: Part) -> tuple[EncodeTask, DenoiseTask, DecodeTask]:
    """A task as the router splits it among the stages; tensors are passed beside it."""
    factor = denoiser.pipeline.vae_scale_factor
    side_px = denoiser.denoiser_config["sample_size"] * factor
    request: dict[str, Any] = {"request_id": "", "model_id": model_id, "deterministic": False}
    size: dict[str, Any] = {"width_px": side_px, "height_px": side_px}
    encode = EncodeTask(**request, prompt=task["prompt"], negative_prompt="", guided=task["guidance_scale"] > 1)
    denoise = DenoiseTask(
        **request,
        **size,
        embeddings={},
        step_count=task["step_count"],
        guidance_scale=task["guidance_scale"],
        seed=task["seed"],
        image_count=1,
        scheduler=task["scheduler"],
    )
    return encode, denoise, DecodeTask(**request, **size, latents=_NO_TENSOR, parameters={})


if __name__ == "__main__":
    given = worker_flags(__doc__)
    answer_lines(InsidePipeline(given.folder, given.device, given.threads).draw)
