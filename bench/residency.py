"""What stays on devices that cannot hold every model: evictions by worth against LRU, on a live cluster.

Twelve models with UNets of their own and all else in common; three denoisers with room for four UNets each. Requests
come as a Poisson stream, in sessions of one model, the models as unequal in popularity as in production (Zipf). Every
way to serve gets the same requests at the same times, in a fresh cluster; the ways take turns.

    python -m bench.residency
"""

import asyncio
import itertools
import json
import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.load import describe, other_cores, read_load
from bench.report import command_line, console, finish, machine, quantile, ratio_of_medians, table
from bench.tasks import Task, distinct_prompts
from darkroom.client import Client
from darkroom.runtime.cluster import ClusterConfig, LocalCluster
from darkroom.store.evicting import EvictionKind
from darkroom.store.indexing import write_index

MODEL_COUNT, DENOISER_COUNT, ROOM_COUNT = 12, 3, 4
WAYS: Mapping[str, EvictionKind] = {"LRU": "lru", "worth": "worth"}
_UNET = Path("unet", "diffusion_pytorch_model.safetensors")
_EXPONENT = 1.1
"""Of the ranks' weights: the first of twelve models gets a third of the sessions."""
_SESSION_MEAN = 3.0
"""Requests of one model after each other, a second or so apart."""
_PAUSE_S = 1.0
_TOUCH_S = 2.0
STEP_COUNT = 8
_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request, and when it comes."""

    at_s: float
    model_id: str
    task: Task


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one way to serve made of the stream."""

    latencies_s: list[float]
    load_count: int
    """Of denoisers' parts of models, after the warm-up."""
    load_s: float
    """All of them together."""

    @property
    def hit_rate(self) -> float:
        """Share of requests that found their model loaded, one load for each that did not."""
        return 1 - self.load_count / len(self.latencies_s)


def make_store(source: Path, store: Path) -> None:
    """Copies a model under twelve names, each with a UNet that differs in its last byte."""
    for number in range(MODEL_COUNT):
        folder = store / model_id(number)
        shutil.copytree(source, folder)
        content = bytearray((folder / _UNET).read_bytes())
        content[-1] ^= number
        (folder / _UNET).write_bytes(content)
    write_index(store)


def model_id(number: int) -> str:
    """The id of one of the store's models."""
    return f"model-{number:02}"


def touches(step_count: int) -> list[Arrival]:
    """A request of each model, so that encoder and VAE hold them all, and every denoiser's room is full."""
    prompts = distinct_prompts(MODEL_COUNT, seed=10_000)
    return [
        Arrival(number * _TOUCH_S, model_id(number), _task(prompt, number, step_count))
        for number, prompt in enumerate(prompts)
    ]


def _task(prompt: str, seed: int, step_count: int) -> Task:
    return Task(prompt=prompt, step_count=step_count, guidance_scale=2.0, seed=seed)


def stream(
    count: int,
    rate: float,
    seed: int,
    *,
    exponent: float = _EXPONENT,
    session_mean: float = _SESSION_MEAN,
    step_count: int = STEP_COUNT,
) -> list[Arrival]:
    """`count` requests, `rate` a second, after the touches; equal seeds give equal streams."""
    rng, prompts = random.Random(seed), distinct_prompts(count, seed)
    weights = [rank**-exponent for rank in range(1, MODEL_COUNT + 1)]
    arrivals: list[tuple[float, str]] = []
    start_s = MODEL_COUNT * _TOUCH_S
    while len(arrivals) < 2 * count:  # sessions reach beyond the last one's start
        start_s += rng.expovariate(rate / session_mean)
        (number,) = rng.choices(range(MODEL_COUNT), weights)
        at_s = start_s
        arrivals.append((at_s, model_id(number)))
        while rng.random() > 1 / session_mean:
            at_s += rng.expovariate(1 / _PAUSE_S)
            arrivals.append((at_s, model_id(number)))
    first = sorted(arrivals)[:count]
    counted = zip(first, prompts, strict=True)
    return [
        *touches(step_count),
        *(Arrival(at_s, name, _task(prompt, n, step_count)) for n, ((at_s, name), prompt) in enumerate(counted)),
    ]


def warm_up_count(arrivals: Sequence[Arrival]) -> int:
    """How many of a stream's requests do not count: the touches, and a tenth of the others."""
    return MODEL_COUNT + (len(arrivals) - MODEL_COUNT) // 10


def cluster_of(kind: EvictionKind, store: Path, folder: Path, denoisers: int = DENOISER_COUNT) -> ClusterConfig:
    """A cluster whose denoisers have room for some of the models; its logs go to `folder`."""
    return ClusterConfig(
        denoisers=denoisers,
        model_store=store,
        default_model=model_id(0),
        device_budget_bytes=_budget_bytes(store),
        eviction=kind,
        log_folder=folder,
    )


async def serve(config: ClusterConfig, arrivals: Sequence[Arrival]) -> Outcome:
    """A fresh cluster serves the stream."""
    warm_up, folder = warm_up_count(arrivals), config.log_folder
    assert folder is not None
    async with AsyncExitStack() as stack:
        cluster = await stack.enter_async_context(LocalCluster(config))
        client = await stack.enter_async_context(Client(router_address=cluster.addresses.router))
        await send(client, arrivals[:warm_up])
        loaded_count = len(loads(folder))
        latencies_s = await send(client, arrivals[warm_up:])
    counted = loads(folder)[loaded_count:]
    return Outcome(latencies_s, len(counted), sum(counted))


def _budget_bytes(store: Path) -> int:
    """Room for four UNets in single precision, which are stored in half, and for no fifth."""
    return ROOM_COUNT * 2 * (store / model_id(0) / _UNET).stat().st_size + (1 << 20)


async def send(client: Client, arrivals: Sequence[Arrival]) -> list[float]:
    """The requests at their times. Returns their latencies."""
    start_s, first_s = time.monotonic(), arrivals[0].at_s

    async def draw(arrival: Arrival) -> float:
        await asyncio.sleep(max(0.0, start_s + arrival.at_s - first_s - time.monotonic()))
        sent_s = time.monotonic()
        await client.draw(arrival.task.drawing(arrival.model_id), timeout_s=_TIMEOUT_S)
        return time.monotonic() - sent_s

    return list(await asyncio.gather(*map(draw, arrivals)))


def loads(folder: Path) -> list[float]:
    """Seconds of each load that a denoiser logged, in the order in which they ended."""
    events = [
        json.loads(line)
        for log in folder.glob("denoiser-*.log")
        for line in log.read_text().splitlines()
        if '"event": "loaded"' in line
    ]
    return [event["load_s"] for event in sorted(events, key=lambda event: str(event["timestamp"]))]


def summarise(outcomes: Mapping[str, Sequence[Outcome]]) -> dict[str, Any]:
    """The figures of each way, over its rounds."""
    figures: dict[str, Any] = {}
    for way, of_way in outcomes.items():
        latencies = list(itertools.chain.from_iterable(outcome.latencies_s for outcome in of_way))
        figures[way] = {
            "mean_s": statistics.fmean(latencies),
            "p50_s": statistics.median(latencies),
            "p99_s": quantile(latencies, 0.99),
            "hit_rate": statistics.fmean(outcome.hit_rate for outcome in of_way),
            "loads": [outcome.load_count for outcome in of_way],
            "load_s": [outcome.load_s for outcome in of_way],
        }
    means = {way: [statistics.fmean(outcome.latencies_s) for outcome in of_way] for way, of_way in outcomes.items()}
    first, *others = outcomes
    for way in others:
        ratio = ratio_of_medians(means[way], means[first])
        figures[way]["mean_ratio"] = (ratio.value, ratio.low, ratio.high)
    return figures


def show(figures: Mapping[str, Any], title: str) -> None:
    """The table."""
    head = ("way", "mean, s", "p50, s", "p99, s", "found loaded", "loads a round", "loading a round, s", "mean, ratio")
    table(title, head, (_row(way, of_way) for way, of_way in figures.items()))


def _row(way: str, of_way: Mapping[str, Any]) -> list[str]:
    ratio = "{:.2f} ({:.2f}–{:.2f})".format(*of_way["mean_ratio"]) if "mean_ratio" in of_way else "1"
    seconds = [f"{of_way[key]:.3f}" for key in ("mean_s", "p50_s", "p99_s")]
    per_round = [f"{statistics.fmean(of_way['loads']):.0f}", f"{statistics.fmean(of_way['load_s']):.1f}"]
    return [way, *seconds, f"{of_way['hit_rate']:.1%}", *per_round, ratio]


async def measure(source: Path, root: Path, rounds: int, count: int, rate: float) -> dict[str, list[Outcome]]:
    """Every way over the same streams, one after the other."""
    store = root / "models"
    make_store(source, store)
    outcomes: dict[str, list[Outcome]] = {way: [] for way in WAYS}
    for number in range(rounds):
        arrivals = stream(count, rate, seed=number)
        for way, kind in WAYS.items():
            outcome = await serve(cluster_of(kind, store, root / f"{way}-{number}"), arrivals)
            outcomes[way].append(outcome)
            console.print(
                f"round {number + 1}, {way}: {statistics.fmean(outcome.latencies_s):.3f} s, {outcome.load_count} loads"
            )
    return outcomes


def main() -> None:
    """The bench."""
    parser = command_line("residency", "Evictions by worth against LRU, on a live cluster.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--count", type=int, default=400, help="requests a round")
    parser.add_argument("--rate", type=float, default=3.0, help="requests a second")
    options = parser.parse_args()
    rounds, count = (1, 30) if options.quick else (options.rounds, options.count)
    os.environ["DARKROOM_HOST_CACHE_BYTES"] = "0"  # what leaves a device comes back from disk
    on, before = machine(), read_load()
    with tempfile.TemporaryDirectory(prefix="darkroom-") as folder:
        work = measure(options.model_store / options.model, Path(folder), rounds, count, options.rate)
        figures = summarise(asyncio.run(work))
    scene = f"{MODEL_COUNT} models, {DENOISER_COUNT} denoisers with room for {ROOM_COUNT} each"
    show(figures, f"{scene}; {rounds} x {count} requests, {options.rate:g} a second")
    console.print(describe(other_cores(before, read_load())))
    finish("residency", on, figures)


if __name__ == "__main__":
    main()
