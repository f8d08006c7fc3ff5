"""Plain diffusers in a process of its own: what the services are measured against.

Everything a careful user would do by hand is done: no progress bar, models loaded once, the scheduler chosen before the
clock starts. The clock stops at the PIL image; writing the PNG, which the services do, is timed apart.
"""

import hashlib
import io
import time
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import StableDiffusionPipeline

from bench.stopwatch import Stopwatch
from bench.worker import Answer, Question, answer_lines, worker_flags
from darkroom.schedulers import scheduler_choice


class PlainPipeline:
    """A pipeline as `from_pretrained` gives it."""

    def __init__(self, folder: Path, device: str) -> None:
        """On a GPU no network is timed by itself: its calls return before its work is done."""
        self._pipeline = StableDiffusionPipeline.from_pretrained(folder, torch_dtype="auto", local_files_only=True)
        self._pipeline.to(device).set_progress_bar_config(disable=True)
        self._own_scheduler = self._pipeline.scheduler
        self._stopwatch = Stopwatch()
        if device == "cpu":
            for owner, method, name in (
                (self._pipeline, "encode_prompt", "encode"),
                (self._pipeline.unet, "forward", "unet"),
                (self._pipeline.vae, "decode", "vae"),
            ):
                self._stopwatch.watch(owner, method, name)

    def draw(self, task: Question) -> Answer:
        """Draws a task. Returns its times in seconds, and a digest of the pixels."""
        self._pipeline.scheduler = self._scheduler(task["scheduler"])
        generator = torch.Generator().manual_seed(task["seed"])
        start_s = time.perf_counter()
        image = self._pipeline(
            task["prompt"],
            num_inference_steps=task["step_count"],
            guidance_scale=task["guidance_scale"],
            generator=generator,
        ).images[0]
        end_s = time.perf_counter()
        image.save(io.BytesIO(), format="PNG")
        png_s = time.perf_counter() - end_s
        digest = hashlib.sha256(image.tobytes()).hexdigest()
        return {"total_s": end_s - start_s, "png_s": png_s, "digest": digest, **self._stopwatch.read()}

    def _scheduler(self, name: str) -> Any:
        if not name:
            return self._own_scheduler
        choice = scheduler_choice(name)
        return getattr(diffusers, choice.class_name).from_config(self._own_scheduler.config, **dict(choice.options))


if __name__ == "__main__":
    given = worker_flags(__doc__)
    torch.set_num_threads(given.threads)
    answer_lines(PlainPipeline(given.folder, given.device).draw)
