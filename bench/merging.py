"""What a step takes on the base, with a LoRA beside it, and with the LoRA merged into it.

    python -m bench.merging

Each row is a company of requests that start together in one executor; a turn draws it with nobody's LoRAs, with them
beside the base, and with them merged. Beside the base all share batches; merged, only those of one pair do: the rows
show where that is worth it. Seconds are of whole denoising runs, by step.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from bench.report import Interval, command_line, console, finish, machine, ratio_of_medians, spread, table
from darkroom.models import denoising, programs
from darkroom.models.adapters import Adapters, Combination, stand_in_carrying
from darkroom.models.executor import Executor
from darkroom.models.journal import Journal
from darkroom.models.loader import Part, load_part
from darkroom.models.merged import Merged, merge, merged_bytes
from darkroom.models.program import Ticket
from darkroom.wire.tasks import DenoiseTask, EncodeTask, LoraUse

_SIDES = ("base", "beside", "merged")
_PROMPT = "a small red circle at the left on a white background"
_GUIDANCE = 2.0
_COMPANIES: Mapping[str, tuple[float, ...]] = {
    "1 request": (1.0,),
    "8 of one pair": (1.0,) * 8,
    "1 beside 7 of the base": (1.0, *[0.0] * 7),
    "8 of as many pairs": tuple(0.65 + 0.05 * number for number in range(8)),
}
"""The scale of each request's LoRA; 0 for none. Other scales are other pairs."""


@dataclass(slots=True)
class Bench:
    """A model's denoiser with a LoRA, in every way."""

    part: Part
    embeddings: Mapping[str, torch.Tensor]
    executor: Executor
    beside: Mapping[float, Combination]
    merged: Mapping[float, Mapping[str, Merged]]
    """By scale, each by the network's name."""
    step_count: int

    def step_s(self, scales: Sequence[float], side: str) -> float:
        """Seconds by step of requests that start together."""
        programs_of = [partial(self._denoise, seed, scale, side) for seed, scale in enumerate(scales)]
        start_s = time.perf_counter()
        for future in [self.executor.submit(program)[0] for program in programs_of]:
            future.result()
        if self.part.device.type == "cuda":
            torch.cuda.synchronize(self.part.device)
        return (time.perf_counter() - start_s) / self.step_count

    def _denoise(self, seed: int, scale: float, side: str) -> torch.Tensor:
        sample_size = int(self.part.denoiser_config["sample_size"])
        side_px = sample_size * self.part.pipeline.vae_scale_factor
        task = DenoiseTask(
            request_id="",
            model_id=self.part.model_id,
            embeddings={},
            width_px=side_px,
            height_px=side_px,
            step_count=self.step_count,
            guidance_scale=_GUIDANCE,
            seed=seed,
            image_count=1,
            scheduler="",
            deterministic=False,
        )
        stand_ins = self._stand_ins(scale, side)
        return denoising.denoise(self.part, task, self.embeddings, Journal(Ticket()), stand_ins=stand_ins)

    def _stand_ins(self, scale: float, side: str) -> Mapping[str, torch.nn.Module]:
        if side == "base" or not scale:
            return {}
        if side == "beside":
            return self.beside[scale].stand_ins()
        return {
            name: stand_in_carrying(getattr(self.part.pipeline, name), merged)
            for name, merged in self.merged[scale].items()
        }


def prepare(store: Path, model_id: str, lora_id: str, device: str, step_count: int) -> tuple[Bench, dict[str, Any]]:
    """Loads, encodes, merges. Returns the bench, and what merging took and takes."""
    executor, torch_device = Executor(max_batch_rows=32, thread_count=1), torch.device(device)
    encoder = load_part(store, model_id, "encoder", torch_device)
    encode = EncodeTask(
        request_id="", model_id=model_id, prompt=_PROMPT, negative_prompt="", guided=True, deterministic=False
    )
    embeddings = executor.submit(partial(programs.encode, encoder, encode))[0].result()
    part = load_part(store, model_id, "denoiser", torch_device)
    scales = sorted({scale for company in _COMPANIES.values() for scale in company if scale})
    beside = asyncio.run(_combinations(Adapters(part, store), lora_id, scales))
    start_s = time.perf_counter()
    merged = {scale: merge(part.networks, combination.loras) for scale, combination in beside.items()}
    merge_s = (time.perf_counter() - start_s) / len(merged)
    loras = beside[scales[0]].loras
    facts = {
        "base_bytes": sum(state.resident_bytes for state in part.network_states()),
        "lora_bytes": sum(scaled.lora.size_bytes for scaled in loras),
        "merged_bytes": merged_bytes(part.networks, loras),
        "merge_s": merge_s,
    }
    return Bench(part, embeddings, executor, beside, merged, step_count), facts


async def _combinations(adapters: Adapters, lora_id: str, scales: Sequence[float]) -> dict[float, Combination]:
    return {scale: await adapters.load([LoraUse(lora_id, scale)]) for scale in scales}


def measure(bench: Bench, turns: int, warm_up: int) -> dict[str, dict[str, list[float]]]:
    """Seconds a step by company and side, turn by turn, each turn beginning with another side."""
    taken: dict[str, dict[str, list[float]]] = {name: {side: [] for side in _SIDES} for name in _COMPANIES}
    for turn in track(range(-warm_up, turns), "Drawing…", console=console, transient=True):
        for name, scales in _COMPANIES.items():
            for place in range(len(_SIDES)):
                side = _SIDES[(turn + place) % len(_SIDES)]
                step_s = bench.step_s(scales, side)
                if turn >= 0:
                    taken[name][side].append(step_s)
    return taken


def summarise(taken: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, Any]:
    """The figures of each company."""
    return {
        name: {
            **{side: spread(by_side[side]) for side in _SIDES},
            "beside_over_base": _bounds(ratio_of_medians(by_side["beside"], by_side["base"])),
            "merged_over_base": _bounds(ratio_of_medians(by_side["merged"], by_side["base"])),
            "merged_over_beside": _bounds(ratio_of_medians(by_side["merged"], by_side["beside"])),
        }
        for name, by_side in taken.items()
    }


def _bounds(interval: Interval) -> list[float]:
    return [interval.value, interval.low, interval.high]


def show(figures: Mapping[str, Any], facts: Mapping[str, Any], title: str) -> None:
    """The table."""
    ratios = ("beside_over_base", "merged_over_base", "merged_over_beside")
    rows = [
        [
            name,
            *(f"{1000 * row[side]['p50_s']:.2f}" for side in _SIDES),
            *("{:.3f} ({:.3f}-{:.3f})".format(*row[ratio]) for ratio in ratios),
        ]
        for name, row in figures.items()
    ]
    head = ["requests", "base, ms a step", "LoRA beside", "merged", "beside / base", "merged / base", "merged / beside"]
    table(title, head, rows)
    console.print(
        f"Bytes: base {facts['base_bytes']:,}, LoRA {facts['lora_bytes']:,}, a merged copy {facts['merged_bytes']:,}, "
        f"made in {facts['merge_s']:.2f} s."
    )


def main() -> None:
    """The bench."""
    parser = command_line("merging", "A LoRA beside its base and merged into it, in company and alone.")
    parser.add_argument("--lora", default="shapes-outline", help="a LoRA of the store, for the model")
    parser.add_argument("--turns", type=int, help="measurements of each company and side; 30 unless told, 3 if quick")
    parser.add_argument("--steps", type=int, default=10, help="of each request")
    given = parser.parse_args()
    on, turns = machine(), given.turns or (3 if given.quick else 30)
    bench, facts = prepare(given.model_store, given.model, given.lora, given.device, given.steps)
    figures = summarise(measure(bench, turns, 1 if given.quick else 3))
    bench.executor.close()
    show(figures, facts, f"{given.model} with {given.lora}: {turns} turns of {given.steps} steps, {given.device}")
    finish("merging", on, {"companies": figures, **facts})


if __name__ == "__main__":
    main()
