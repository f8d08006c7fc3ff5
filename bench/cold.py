"""The first request of a model that no replica holds: its stages load at once, or one after the other.

Copies of one model, no two of which have a file in common, on a cluster of one replica each. Every copy is drawn once
cold, its files out of the page cache, and once more warm. Both ways draw the same copies in fresh clusters and take
turns, so that each copy and round is a pair.

    python -m bench.cold
"""

import asyncio
import os
import shutil
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.load import describe, other_cores, read_load
from bench.report import command_line, console, finish, machine, quantile, ratio_of_medians, table
from bench.tasks import Task, distinct_prompts
from darkroom.client import Client
from darkroom.runtime.cluster import ClusterConfig, LocalCluster
from darkroom.store.indexing import write_index

WAYS: Mapping[str, bool] = {"one after the other": False, "at once": True}
"""Whether the router prepares stages, by the name of the way."""
_STEP_COUNT = 8
_TIMEOUT_S = 120.0


@dataclass(slots=True)
class Times:
    """What one way took, by copy and round; the ways' lists go together."""

    cold_s: list[float] = field(default_factory=list)
    warm_s: list[float] = field(default_factory=list)


def make_store(source: Path, store: Path, count: int) -> list[str]:
    """Copies a model under so many names, each weights file of its own in its last byte. Returns the names."""
    names = [f"model-{number:02}" for number in range(count)]
    for number, name in enumerate(names):
        shutil.copytree(source, store / name)
        for file in (store / name).rglob("*.safetensors"):
            content = bytearray(file.read_bytes())
            content[-1] ^= number
            file.write_bytes(content)
    write_index(store)
    os.sync()  # pages that are not on disk yet stay in the page cache
    return names


def drop(folder: Path) -> None:
    """Drops a folder's files from the page cache."""
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


async def turn(store: Path, names: Sequence[str], folder: Path, times: Times, *, prepares_stages: bool) -> None:
    """A fresh cluster draws every copy, cold and warm. The first shows what processes do once, and does not count."""
    os.environ["DARKROOM_PREPARES_STAGES"] = str(prepares_stages).lower()
    config = ClusterConfig(denoisers=1, model_store=store, default_model=names[0], log_folder=folder)
    prompts = distinct_prompts(2 * len(names), seed=0)
    async with LocalCluster(config) as cluster, Client(router_address=cluster.addresses.router) as client:
        for number, name in enumerate(names):
            drop(store / name)
            seconds = [await _drawn_s(client, name, prompts[2 * number + again], number) for again in range(2)]
            if number:
                times.cold_s.append(seconds[0])
                times.warm_s.append(seconds[1])


async def _drawn_s(client: Client, name: str, prompt: str, seed: int) -> float:
    task = Task(prompt=prompt, step_count=_STEP_COUNT, guidance_scale=2.0, seed=seed)
    return (await client.draw(task.drawing(name), timeout_s=_TIMEOUT_S)).total_s


async def measure(source: Path, root: Path, rounds: int, count: int) -> dict[str, Times]:
    """Every way over the same copies, in turns whose order changes with the round."""
    names = make_store(source, root / "models", count + 1)
    times = {way: Times() for way in WAYS}
    for number in range(rounds):
        ways = list(WAYS)[:: -1 if number % 2 else 1]
        for way in ways:
            folder = root / f"logs-{number}-{WAYS[way]}"
            await turn(root / "models", names, folder, times[way], prepares_stages=WAYS[way])
            cold_s = statistics.median(times[way].cold_s[-count:])
            console.print(f"round {number + 1}, {way}: {cold_s:.3f} s cold")
    return times


def summarise(times: Mapping[str, Times]) -> dict[str, Any]:
    """The figures of each way, and how a cold request at once compares with one stage after the other."""
    figures: dict[str, Any] = {
        way: {
            "cold_p50_s": statistics.median(of_way.cold_s),
            "cold_p95_s": quantile(of_way.cold_s, 0.95),
            "warm_p50_s": statistics.median(of_way.warm_s),
        }
        for way, of_way in times.items()
    }
    first, *others = times
    for way in others:
        for kind in ("cold_s", "warm_s"):
            ratio = ratio_of_medians(getattr(times[way], kind), getattr(times[first], kind))
            figures[way][f"{kind.removesuffix('_s')}_ratio"] = (ratio.value, ratio.low, ratio.high)
    return figures


def show(figures: Mapping[str, Any], title: str) -> None:
    """The table."""
    head = ("stages load", "cold p50, s", "cold p95, s", "warm p50, s", "cold, ratio", "warm, ratio")
    table(title, head, (_row(way, of_way) for way, of_way in figures.items()))


def _row(way: str, of_way: Mapping[str, Any]) -> list[str]:
    seconds = [f"{of_way[key]:.3f}" for key in ("cold_p50_s", "cold_p95_s", "warm_p50_s")]
    ratios = [of_way.get(key) for key in ("cold_ratio", "warm_ratio")]
    return [way, *seconds, *("{:.2f} ({:.2f}–{:.2f})".format(*ratio) if ratio else "1" for ratio in ratios)]


def main() -> None:
    """The bench."""
    parser = command_line("cold", "First requests of cold models: stages that load at once, or one after the other.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--count", type=int, default=8, help="copies of the model")
    options = parser.parse_args()
    rounds, count = (1, 2) if options.quick else (options.rounds, options.count)
    os.environ["DARKROOM_HOST_CACHE_BYTES"] = "0"
    on, before = machine(), read_load()
    with tempfile.TemporaryDirectory(prefix="darkroom-") as folder:
        times = asyncio.run(measure(options.model_store / options.model, Path(folder), rounds, count))
    figures = summarise(times)
    show(figures, f"First requests of {count} cold models, {rounds} rounds")
    console.print(describe(other_cores(before, read_load())))
    finish("cold", on, figures)


if __name__ == "__main__":
    main()
