"""Whether the simulator says what a live cluster does: the same requests on both, from costs measured beforehand.

A cluster of two denoisers draws requests alone, which gives the cost of a request, of a step, and of more images in a
step; its first draw of each model gives the loads; two requests at a time, on both, tell how many cores the machine is
worth, for stages that compute at once slow each other. Then twelve models share room for four on each denoiser, live
and simulated, under evictions by age and by worth. Mean and p95 latency, the share that found its model loaded, and the
loads should agree within 15 %; if they do not, this ends with status 1.

    python -m bench.calibration
"""

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.load import describe, other_cores, read_load
from bench.report import command_line, console, finish, machine, quantile, table
from bench.residency import (
    MODEL_COUNT,
    ROOM_COUNT,
    STEP_COUNT,
    WAYS,
    Arrival,
    Outcome,
    cluster_of,
    loads,
    make_store,
    model_id,
    send,
    serve,
    stream,
    touches,
    warm_up_count,
)
from bench.tasks import Task, distinct_prompts
from darkroom.client import Client
from darkroom.runtime.cluster import ClusterConfig, LocalCluster
from darkroom.store.evicting import EvictionKind
from simulator.cluster import Cluster, Hardware
from simulator.costs import Loader, Sizes, Work
from simulator.live import Live, LiveConfig
from simulator.workload import Request

_DENOISER_COUNT = 2
_WITHIN = 0.15
_NEVER_S = 1e6
_PROBED_STEPS = (2, 8, 16)
_PROBED_IMAGES = 4
_REPEATS = 7


@dataclass(frozen=True, slots=True)
class Costs:
    """What was measured of a cluster at rest."""

    work: Work
    load_s: float
    """Of a model's part in a denoiser."""
    core_count: float
    """What two denoisers at work get done, in those of one alone: the cores that all stages share."""


async def probe(config: ClusterConfig) -> Costs:
    """Draws alone what tells the costs apart."""
    folder = config.log_folder
    assert folder is not None
    async with LocalCluster(config) as cluster, Client(router_address=cluster.addresses.router) as client:
        await send(client, touches())
        load_s = statistics.median(loads(folder))
        seconds = {
            (images, steps): await _median_s(client, model_id(0), steps, images, seed=100 * steps + images)
            for images in (1, _PROBED_IMAGES)
            for steps in _PROBED_STEPS
        }
        core_count = await _core_count(client)
    fixed_s, step_s = _line([seconds[1, steps] for steps in _PROBED_STEPS])
    _, step_of_many_s = _line([seconds[_PROBED_IMAGES, steps] for steps in _PROBED_STEPS])
    marginal = (step_of_many_s / step_s - 1) / (_PROBED_IMAGES - 1)
    return Costs(Work(fixed_s=fixed_s, step_s=step_s, marginal=marginal), load_s, core_count)


async def _core_count(client: Client) -> float:
    """Draws with models that different replicas have, each alone and then both at once."""
    homes: dict[str, str] = {}
    for number in reversed(range(MODEL_COUNT)):  # those that were touched last are loaded
        (prompt,) = distinct_prompts(1, seed=number)
        drawn = await client.draw(_probe_task(prompt, _PROBED_STEPS[-1], number).drawing(model_id(number)))
        (replica_id,) = [stage.replica_id for stage in drawn.stages if stage.stage == "denoiser"]
        homes.setdefault(replica_id, model_id(number))
        if len(homes) == _DENOISER_COUNT:
            break
    models = list(homes.values())
    alone_s = [await _median_s(client, model, _PROBED_STEPS[-1], 1, seed=1) for model in models]
    both_s = await asyncio.gather(*(_median_s(client, model, _PROBED_STEPS[-1], 1, seed=2) for model in models))
    return len(models) * sum(alone_s) / sum(both_s)


async def _median_s(client: Client, model: str, steps: int, images: int, *, seed: int) -> float:
    """`seed` makes the prompts: those of another probe would be in the encoder's cache."""
    times = []
    for number, prompt in enumerate(distinct_prompts(_REPEATS, seed)):
        drawing = replace(_probe_task(prompt, steps, number).drawing(model), image_count=images)
        times.append((await client.draw(drawing)).total_s)
    return statistics.median(times[1:])


def _probe_task(prompt: str, steps: int, seed: int) -> Task:
    return Task(prompt=prompt, step_count=steps, guidance_scale=2.0, seed=seed)


def _line(seconds: Sequence[float]) -> tuple[float, float]:
    """Where a line through the probes begins, and by how much it rises with a step."""
    rise, start = np.polyfit(_PROBED_STEPS, seconds, 1)
    return float(start), float(rise)


def simulate(costs: Costs, kind: EvictionKind, arrivals: Sequence[Arrival], model_bytes: int) -> Outcome:
    """The same requests on virtual workers."""
    requests = [
        Request(number=number, arrival_s=arrival.at_s, base=arrival.model_id, image_count=1, step_count=STEP_COUNT)
        for number, arrival in enumerate(arrivals)
    ]
    warm_up = warm_up_count(arrivals)
    before, _ = _replay(costs, kind, requests[:warm_up], model_bytes)
    cluster, latencies_s = _replay(costs, kind, requests, model_bytes)
    load_count = _load_count(cluster) - _load_count(before)
    return Outcome(latencies_s[warm_up:], load_count, load_count * costs.load_s)


def _replay(
    costs: Costs, kind: EvictionKind, requests: Sequence[Request], model_bytes: int
) -> tuple[Cluster, list[float]]:
    """The cluster at the end, and the latencies in the order of the requests."""
    loader = Loader(network_s=0.0, disk_s=costs.load_s, bus_s=0.0, attach_s=0.0, is_streaming=True, overlaps=True)
    names = tuple(map(model_id, range(MODEL_COUNT)))
    config = LiveConfig(loader=loader, work=costs.work, eviction=kind, model_bytes=model_bytes, model_names=names)
    hardware = Hardware(
        worker_count=_DENOISER_COUNT, rooms=(float(ROOM_COUNT), 0.0, float(MODEL_COUNT)), core_count=costs.core_count
    )
    cluster = Cluster(Live(config), hardware, Sizes(0, spread=0.0), seed=0)
    jobs = sorted(cluster.replay(requests), key=lambda job: job.request.number)
    return cluster, [job.finish_s - job.request.arrival_s for job in jobs]


def _load_count(cluster: Cluster) -> int:
    return sum(sum(worker.load_counts) for worker in cluster.workers)


def compare(live: Outcome, simulated: Outcome) -> dict[str, tuple[float, float]]:
    """Live and simulated figures, by name."""
    return {
        "mean, s": (statistics.fmean(live.latencies_s), statistics.fmean(simulated.latencies_s)),
        "p95, s": (quantile(live.latencies_s, 0.95), quantile(simulated.latencies_s, 0.95)),
        "found loaded": (live.hit_rate, simulated.hit_rate),
        "loads": (live.load_count, simulated.load_count),
    }


async def measure(options: argparse.Namespace, root: Path) -> dict[str, Any]:
    """The costs, and the figures of each way."""
    store, count = root / "models", 40 if options.quick else options.count
    make_store(options.model_store / options.model, store)
    costs = await probe(cluster_of("worth", store, root / "probe", _DENOISER_COUNT))
    model_bytes = sum(file.stat().st_size for file in (store / model_id(0)).rglob("*.safetensors"))
    arrivals = stream(count, options.rate, seed=0)
    figures: dict[str, Any] = {"costs": asdict(costs)}
    for way, kind in WAYS.items():
        live = await serve(cluster_of(kind, store, root / way, _DENOISER_COUNT), arrivals)
        figures[way] = compare(live, simulate(costs, kind, arrivals, model_bytes))
    return figures


def agrees(live: float, simulated: float) -> bool:
    """Whether two figures differ by no more than they may."""
    return abs(simulated - live) <= _WITHIN * live


def show(figures: dict[str, Any]) -> bool:
    """Prints the table. Returns whether everything agrees."""
    rows = [
        [f"{way}: {name}", f"{live:.3g}", f"{simulated:.3g}", f"{simulated / live - 1:+.1%}" if live else ""]
        for way in WAYS
        for name, (live, simulated) in figures[way].items()
    ]
    scene = f"{MODEL_COUNT} models, {_DENOISER_COUNT} denoisers with room for {ROOM_COUNT} each"
    table(scene, ("figure", "live", "simulated", "difference"), rows)
    return all(agrees(*pair) for way in WAYS for pair in figures[way].values())


def main() -> None:
    """The bench."""
    parser = command_line("calibration", "Whether the simulator says what a live cluster does.")
    parser.add_argument("--count", type=int, default=300, help="requests")
    parser.add_argument("--rate", type=float, default=1.0, help="requests a second")
    options = parser.parse_args()
    os.environ["DARKROOM_HOST_CACHE_BYTES"] = "0"  # what leaves a device comes back from disk
    os.environ["DARKROOM_PLAN_INTERVAL_S"] = str(_NEVER_S)  # `simulator.live` knows no plans
    on, before = machine(), read_load()
    with tempfile.TemporaryDirectory(prefix="darkroom-") as folder:
        figures = asyncio.run(measure(options, Path(folder)))
    is_met = show(figures)
    console.print(f"Within {_WITHIN:.0%}: {'yes' if is_met else 'no'}. {describe(other_cores(before, read_load()))}")
    finish("calibration", on, figures)
    sys.exit(0 if is_met else 1)


if __name__ == "__main__":
    main()
