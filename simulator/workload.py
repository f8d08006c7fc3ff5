"""Requests and when they come: read from the public trace, faster, or in another shape. `generator` makes some up."""

import csv
import gzip
import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

MAX_GAP_S = 60.0
"""Longest gap between two requests that is kept: what is longer is night, and tells nothing of a busy cluster."""
_DEFAULT_IMAGES, _DEFAULT_STEPS = 1.0, 30.0
_LORA = re.compile(r"'modelVersionId': '?([^',}]+)'?(?:, 'scale': ([-0-9.]+))?")


class LoraUse(NamedTuple):
    """One LoRA of a request."""

    lora_id: str
    scale: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request of a workload."""

    number: int
    arrival_s: float
    base: str
    loras: tuple[LoraUse, ...] = ()
    image_count: int = 1
    step_count: int = 30

    @property
    def pipeline(self) -> str:
        """What is asked for as a whole: the base and its LoRAs at their scales. The unit of placement."""
        return "+".join((self.base, *(f"{lora.lora_id}:{lora.scale:g}" for lora in self.loras)))


def read_gentd26(path: Path, *, max_gap_s: float = MAX_GAP_S) -> list[Request]:
    """The requests of GenTD26 (Alibaba cluster-trace-v2026-GenAI), in order; gaps longer than `max_gap_s` are cut.

    Raises ValueError, naming the line, for a file of another form.
    """
    requests: list[Request] = []
    clock_s, previous_s = 0.0, None
    for number, row in enumerate(_rows(path)):
        try:
            stamp_s = datetime.fromisoformat(row["gmt_create"]).timestamp()
            made = Request(
                number=number,
                arrival_s=0.0,
                base=row["checkpoint_model_version_id"],
                loras=_loras(row["lora_args"]),
                image_count=int(float(row["num_images_per_prompt"] or _DEFAULT_IMAGES)),
                step_count=int(float(row["num_inference_steps"] or _DEFAULT_STEPS)),
            )
        except (KeyError, ValueError, TypeError) as error:
            raise ValueError(f"{path}, line {number + 2}: no request of GenTD26 ({error})") from error
        clock_s += min(max(stamp_s - (stamp_s if previous_s is None else previous_s), 0.0), max_gap_s)
        previous_s = stamp_s
        requests.append(replace(made, arrival_s=clock_s))
    return requests


def _rows(path: Path) -> Iterator[dict[str, str]]:
    with gzip.open(path, "rt", newline="") if path.suffix == ".gz" else path.open(newline="") as file:
        yield from csv.DictReader(file)


def _loras(text: str) -> tuple[LoraUse, ...]:
    return tuple(LoraUse(name, float(scale or 1.0)) for name, scale in _LORA.findall(text))


def compressed(requests: Sequence[Request], factor: float) -> list[Request]:
    """The same requests, `factor` times as fast after each other."""
    return [replace(request, arrival_s=request.arrival_s / factor) for request in requests]


Shape = Callable[[float], float]
"""How busy a workload is, by the share of it that has passed, 0 to 1."""


def diurnal(passed: float) -> float:
    """Two days: three times as busy in the evening as in the morning."""
    return 1 + 0.5 * math.sin(4 * math.pi * passed)


def bursts(passed: float) -> float:
    """Five bursts, each a twentieth of the time between and eight times as busy."""
    return 8.0 if 100 * passed % 20 < 1 else 1.0


def azure(passed: float) -> float:
    """As on Azure Functions: eight times as busy at the peak as at first, in waves."""
    return 1 + 7 * passed * (0.75 + 0.25 * math.sin(40 * passed))


SHAPES: dict[str, Shape] = {"diurnal": diurnal, "bursts": bursts, "azure": azure}
_SHAPE_STEPS = 10_000


def shaped(requests: Sequence[Request], shape: Shape, *, seed: int) -> list[Request]:
    """The same requests in the same time and order, come by chance (Poisson) at rates of this shape."""
    span_s, rng = requests[-1].arrival_s, random.Random(seed)
    total, sums = 0.0, []
    for step in range(_SHAPE_STEPS):
        total += shape(step / _SHAPE_STEPS)
        sums.append(total)
    arrivals = iter(sorted(rng.random() * total for _ in requests))
    made, step = [], 0
    for request, arrival in zip(requests, arrivals, strict=True):
        while sums[step] < arrival:
            step += 1
        made.append(replace(request, arrival_s=span_s * (step + 1) / _SHAPE_STEPS))
    return made
