"""What every bench leaves behind: a table for people, then one line of JSON for programs, kept in out/bench as well."""

import argparse
import json
import os
import platform
import random
import shlex
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

FOLDER = Path("out/bench")
_RESAMPLE_COUNT = 2000
_FILE_WIDTH = 200
"""Of tables that go to a file: nothing is cut."""
console = Console(soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else _FILE_WIDTH)


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure, and the range that holds it in 19 of 20 resamplings."""

    value: float
    low: float
    high: float


def command_line(program: str, description: str) -> argparse.ArgumentParser:
    """A parser with the flags that all benches share."""
    parser = argparse.ArgumentParser(prog=f"python -m bench.{program}", description=description)
    parser.add_argument("--quick", action="store_true", help="a few requests only, to see that the bench runs")
    parser.add_argument("--device", default="cpu", help="torch device of the stages and of plain diffusers")
    parser.add_argument("--model", default="shapes", help="a Stable Diffusion model of the store")
    parser.add_argument("--model-store", type=Path, default=Path("models"), help="folder of models")
    return parser


def ratio_of_medians(above: Sequence[float], below: Sequence[float]) -> Interval:
    """Median of `above` over median of `below`, resampled by pairs: both were measured turn by turn."""
    rng = random.Random(0)
    pairs = list(zip(above, below, strict=True))
    ratios = sorted(_ratio(rng.choices(pairs, k=len(pairs))) for _ in range(_RESAMPLE_COUNT))
    return Interval(_ratio(pairs), ratios[int(0.025 * _RESAMPLE_COUNT)], ratios[int(0.975 * _RESAMPLE_COUNT)])


def _ratio(pairs: Sequence[tuple[float, float]]) -> float:
    return statistics.median(a for a, _ in pairs) / statistics.median(b for _, b in pairs)


def quantile(values: Iterable[float], share: float) -> float:
    """The value below which `share` of the values lie; the nearest one measured, nothing interpolated."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most of times in seconds."""
    return {"p50_s": statistics.median(values), "min_s": min(values), "max_s": max(values)}


def table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints a table; the first column holds names, the others numbers."""
    shown = Table(title=title, title_justify="left", title_style="bold")
    for number, name in enumerate(head):
        shown.add_column(name, justify="right" if number else "left")
    for row in rows:
        shown.add_row(*row)
    console.print(shown)


def machine() -> dict[str, Any]:
    """What the figures were measured on, and how busy it was before."""
    return {
        "cpu": _cpu_model(),
        "cpu_count": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "diffusers", "grpcio")},
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }


def _cpu_model() -> str:
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def finish(name: str, on: Mapping[str, Any], figures: Mapping[str, Any]) -> None:
    """Ends a bench: one line of JSON on the terminal and in out/bench/NAME.json. `on`: the machine at the start."""
    command = shlex.join(["python", "-m", f"bench.{name}", *sys.argv[1:]])
    outcome = {
        "name": name,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": on,
        "command": command,
        "figures": _rounded(figures),
    }
    line = json.dumps(outcome)
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / f"{name}.json").write_text(line + "\n")
    print(line)


def _rounded(value: Any) -> Any:
    """Five significant digits: more than any timing here holds."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, Mapping):
        return {key: _rounded(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(part) for part in value]
    return value
