"""Requests and when they come: from the public trace, or made up after its published statistics."""

import csv
import gzip
import re
from collections.abc import Iterator, Sequence
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
    opened = gzip.open(path, "rt", newline="") if path.suffix == ".gz" else path.open(newline="")
    with opened as file:
        yield from csv.DictReader(file)


def _loras(text: str) -> tuple[LoraUse, ...]:
    return tuple(LoraUse(name, float(scale or 1.0)) for name, scale in _LORA.findall(text))


def compressed(requests: Sequence[Request], factor: float) -> list[Request]:
    """The same requests, `factor` times as fast after each other."""
    return [replace(request, arrival_s=request.arrival_s / factor) for request in requests]
