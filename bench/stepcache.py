"""What answering forwards from a request's own history saves and what it costs in pictures.

Each row draws the same prompts and seeds in one executor, as many requests at once as there are prompts, and compares
the pictures with those drawn without the cache: by PSNR, and by what the judge reads off them. The second table has
random networks of the transformer families, half of the requests with a cache and half without, all in one executor:
those without must come out as from plain diffusers.
"""

import copy
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline

from bench import report
from darkroom.models import denoising, programs
from darkroom.models.executor import Executor
from darkroom.models.journal import Journal
from darkroom.models.loader import Part, load_part
from darkroom.models.program import Ticket
from darkroom.models.stepcache import Cached, StepCache
from darkroom.wire.tasks import DecodeTask, DenoiseTask, EncodeTask
from darkroom.wire.tensors import RawTensor
from tests.tiny_models import save_tiny_model
from training.evaluate import shares
from training.judge import mark_all
from training.scenes import caption, random_scene

_SCENES_SEED = 2026
_GUIDANCE = 4.0
_NO_TENSOR = RawTensor("float32", (0,), b"")
_SAME_DB = 99.0
"""Stands for pictures without any difference."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """One picture's latents: what a request would say."""

    prompt: str
    scheduler: str
    step_count: int
    guidance_scale: float
    seed: int
    threshold: float
    side_px: int


@dataclass(slots=True)
class Run:
    """What came of a row's wishes, in their order."""

    latents: list[torch.Tensor]
    caches: list[StepCache]
    tickets: list[Ticket]
    run_s: float

    @property
    def saved(self) -> float:
        """Share of forwards answered."""
        answered = sum(cache.counts.answered for cache in self.caches)
        return answered / max(1, answered + sum(cache.counts.computed for cache in self.caches))


class Studio:
    """A model's three parts over one executor."""

    def __init__(self, store: Path, model_id: str, device: str) -> None:
        """On a CPU with one torch thread."""
        self.model_id = model_id
        self._executor = Executor(max_batch_rows=32, thread_count=1)
        stages = ("encoder", "denoiser", "vae")
        self._parts = {stage: load_part(store, model_id, stage, torch.device(device)) for stage in stages}
        self._embeddings: dict[tuple[str, bool], dict[str, torch.Tensor]] = {}

    @property
    def side_px(self) -> int:
        """Side of the pictures that the model was made for."""
        part = self._parts["denoiser"]
        return int(part.denoiser_config["sample_size"] * part.pipeline.vae_scale_factor)

    def denoise(self, wishes: Sequence[Wish]) -> Run:
        """Denoises all wishes at once."""
        part = self._parts["denoiser"]
        embeddings = [self._encoded(wish) for wish in wishes]
        caches = [StepCache(wish.threshold) for wish in wishes]
        start_s = time.perf_counter()
        begun = [
            self._executor.submit(partial(_denoise, part, self._task(wish), embedded, cache))
            for wish, embedded, cache in zip(wishes, embeddings, caches, strict=True)
        ]
        latents = [future.result() for future, _ in begun]
        return Run(latents, caches, [ticket for _, ticket in begun], time.perf_counter() - start_s)

    def decode(self, latents: Sequence[torch.Tensor], side_px: int) -> np.ndarray:
        """Pictures [N, H, W, 3] uint8."""
        task = DecodeTask(
            request_id="",
            model_id=self.model_id,
            latents=_NO_TENSOR,
            width_px=side_px,
            height_px=side_px,
            parameters={},
            deterministic=False,
        )
        begun = [self._executor.submit(partial(programs.decode, self._parts["vae"], task, one))[0] for one in latents]
        return np.stack([np.asarray(future.result()[0]) for future in begun])

    def _encoded(self, wish: Wish) -> dict[str, torch.Tensor]:
        part = self._parts["encoder"]
        key = (wish.prompt, part.family.is_guided(wish.guidance_scale))
        if key not in self._embeddings:
            task = EncodeTask(
                request_id="",
                model_id=self.model_id,
                prompt=wish.prompt,
                negative_prompt="",
                guided=key[1],
                deterministic=False,
            )
            self._embeddings[key] = self._executor.submit(partial(programs.encode, part, task))[0].result()
        return self._embeddings[key]

    def _task(self, wish: Wish) -> DenoiseTask:
        return DenoiseTask(
            request_id="",
            model_id=self.model_id,
            embeddings={},
            width_px=wish.side_px,
            height_px=wish.side_px,
            step_count=wish.step_count,
            guidance_scale=wish.guidance_scale,
            seed=wish.seed,
            image_count=1,
            scheduler=wish.scheduler,
            deterministic=False,
        )

    def close(self) -> None:
        """Ends the executor."""
        self._executor.close()


def _denoise(part: Part, task: DenoiseTask, embeddings: Mapping[str, torch.Tensor], cache: StepCache) -> torch.Tensor:
    """The denoiser's program with a cache between the pipeline and its denoiser."""
    journal = Journal(Ticket())
    pipeline, name = copy.copy(part.pipeline), part.family.denoiser
    cached = Cached(getattr(pipeline, name), name, cache, lambda: (journal.done, journal.step_count))
    object.__setattr__(pipeline, name, cached)
    return denoising.denoise(replace(part, pipeline=pipeline), task, embeddings, journal)


def psnr_db(pictures: np.ndarray, originals: np.ndarray) -> np.ndarray:
    """Peak signal to noise ratio of each picture, [N, H, W, 3] uint8, at most 99 dB."""
    error = (pictures.astype(np.float64) - originals).reshape(len(pictures), -1)
    decibels: np.ndarray = np.minimum(_SAME_DB, 10 * np.log10(255**2 / np.maximum(np.square(error).mean(1), 1e-9)))
    return decibels


def compare(
    studio: Studio, schedulers: Sequence[str], steps: Sequence[int], thresholds: Sequence[float], count: int
) -> list[dict[str, Any]]:
    """One row per scheduler, step count and threshold, the uncached one first."""
    rng = random.Random(_SCENES_SEED)
    scenes = [random_scene(rng) for _ in range(count)]
    rows = []
    for scheduler in schedulers:
        for step_count in steps:
            originals = np.empty(0)
            for threshold in (0.0, *thresholds):
                wish = partial(Wish, scheduler=scheduler, step_count=step_count, threshold=threshold)
                wishes = [
                    wish(prompt=caption(scene), guidance_scale=_GUIDANCE, seed=seed, side_px=studio.side_px)
                    for seed, scene in enumerate(scenes)
                ]
                run = studio.denoise(wishes)
                pictures = studio.decode(run.latents, studio.side_px)
                originals = pictures if threshold == 0 else originals
                decibels = psnr_db(pictures, originals)
                rows.append(
                    {
                        "scheduler": scheduler,
                        "step_count": step_count,
                        "threshold": threshold,
                        "saved": run.saved if threshold else 0.0,
                        "picture_count": count,
                        "psnr_p50_db": float(np.median(decibels)),
                        "psnr_p10_db": float(np.quantile(decibels, 0.1)),
                        "run_s": run.run_s,
                        "cache_bytes": max(cache.size_bytes for cache in run.caches),
                        **{f"judge_{name}": value for name, value in shares(mark_all(pictures, scenes)).items()},
                    }
                )
                report.console.print(*_shown(rows[-1]))
    return rows


def _shown(row: Mapping[str, Any]) -> list[str]:
    is_cached = row["threshold"] > 0
    return [
        f"{row['scheduler']} × {row['step_count']}",
        f"{row['threshold']:g}" if is_cached else "off",
        f"{row['saved']:.1%}",
        f"{row['psnr_p50_db']:.1f}" if is_cached else "",
        f"{row['psnr_p10_db']:.1f}" if is_cached else "",
        f"{row['judge_everything']:.1%}",
        f"{row['run_s']:.1f}",
    ]


def beside_uncached(model_id: str, step_count: int, threshold: float) -> dict[str, Any]:
    """Eight requests of a tiny random model in one executor, every second one cached, against plain diffusers."""
    with tempfile.TemporaryDirectory() as folder:
        save_tiny_model(Path(folder), model_id)
        studio = Studio(Path(folder), model_id, "cpu")
        wishes = [
            Wish(
                prompt=f"a red circle {seed}",
                scheduler="",
                step_count=step_count,
                guidance_scale=3.5,
                seed=seed,
                threshold=threshold * (seed % 2),
                side_px=32,
            )
            for seed in range(8)
        ]
        run = studio.denoise(wishes)
        studio.close()
        plain = DiffusionPipeline.from_pretrained(Path(folder) / model_id)
        plain.set_progress_bar_config(disable=True)
        errors = [_distance(plain, wish, latents) for wish, latents in zip(wishes, run.latents, strict=True)]
    cached = [ticket for ticket, wish in zip(run.tickets, wishes, strict=True) if wish.threshold]
    return {
        "model": model_id,
        "saved": sum(cache.counts.answered for cache in run.caches) / (step_count * len(cached)),
        "cached_error": max(errors[1::2]),
        "uncached_error": max(errors[::2]),
        "forwards": sum(ticket.forwards for ticket in run.tickets),
        "batched": sum(ticket.batched for ticket in run.tickets),
        "cached_batched": sum(ticket.batched for ticket in cached) / max(1, sum(ticket.forwards for ticket in cached)),
    }


def _distance(plain: DiffusionPipeline, wish: Wish, latents: torch.Tensor) -> float:
    """Relative distance of latents from plain diffusers' own."""
    expected = plain(
        wish.prompt,
        num_inference_steps=wish.step_count,
        guidance_scale=wish.guidance_scale,
        width=wish.side_px,
        height=wish.side_px,
        generator=torch.Generator().manual_seed(wish.seed),
        output_type="latent",
    ).images
    return float((latents - expected).norm() / expected.norm())


def main() -> None:
    """Prints both tables."""
    parser = report.command_line("stepcache", "Forwards saved by the step cache, and what the pictures lose.")
    parser.add_argument("--count", type=int, default=64, help="pictures per row")
    parser.add_argument("--schedulers", nargs="+", default=["ddim", "euler", "dpmpp_2m"])
    parser.add_argument("--steps", nargs="+", type=int, default=[25, 50])
    parser.add_argument("--thresholds", nargs="+", type=float, default=[0.1, 0.2, 0.3])
    options = parser.parse_args()
    on = report.machine()
    studio = Studio(options.model_store, options.model, options.device)
    if options.quick:
        rows = compare(studio, options.schedulers[:1], [10], options.thresholds[1:2], 4)
    else:
        rows = compare(studio, options.schedulers, options.steps, options.thresholds, options.count)
    studio.close()
    head = ("solver × steps", "threshold", "saved", "PSNR p50, dB", "p10", "all right", "run, s")
    report.table(f"{options.model}, {rows[0]['picture_count']} pictures a row", head, map(_shown, rows))
    tiny = [beside_uncached(model_id, 10 if options.quick else 30, 0.2) for model_id in ("tiny-sd3", "tiny-flux")]
    report.table(
        "Random transformers, every second request cached at 0.2",
        ("model", "saved", "error, cached", "error, uncached", "cached requests' forwards in a batch"),
        (
            (
                row["model"],
                f"{row['saved']:.1%}",
                f"{row['cached_error']:.1e}",
                f"{row['uncached_error']:.1e}",
                f"{row['cached_batched']:.1%}",
            )
            for row in tiny
        ),
    )
    report.finish("stepcache", on, {"shapes": rows, "transformers": tiny})


if __name__ == "__main__":
    main()
