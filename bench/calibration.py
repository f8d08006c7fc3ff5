"""Whether the simulator says what a live cluster does: the same requests on both, from costs measured beforehand.

A cluster of two denoisers draws requests alone, which gives the cost of a request, of a step, and of more images in a
step; its loads are in the logs; requests beside each other, on both, tell how many cores the machine is worth, for
stages that compute at once slow each other. Then twelve models share room for four on each denoiser, live and
simulated, under evictions by age and by worth: models as popular as makes every fifth request load, or their number
would say little. Mean and p95 latency, the share that found its model loaded, and the loads should agree within 15 %;
if they do not, this ends with status 1.

Two things blur the comparison. Machines change their speed within minutes: costs are probed before and after each run,
and taken at the speed at which the run itself served the requests that nobody disturbed. And where a request goes hangs
on milliseconds, so that no two runs load alike: simulated figures are means over replays at costs that differ a little.

    python -m bench.calibration
"""

import argparse
import asyncio
import itertools
import math
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bench.load import describe, other_cores, read_load
from bench.report import command_line, console, finish, machine, quantile, table
from bench.residency import (
    MODEL_COUNT,
    ROOM_COUNT,
    WAYS,
    Arrival,
    Outcome,
    cluster_of,
    loads,
    make_store,
    model_id,
    serve,
    stream,
    warm_up_count,
)
from bench.tasks import Task, distinct_prompts
from darkroom.client import Client, Drawing
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
_PAUSE_S = 1.0
"""As requests of the stream have between them: right after another one, a load finds the processor's caches warm."""
_IN_A_ROW = 4
_STEP_COUNT = 4
"""Few, so that a load takes longer than the wait for a busy replica, as in production. Where it does not, routers load
a second copy whenever two requests overlap, and chance decides how often."""
_EXPONENT = 0.5
"""Of the ranks' weights: the first of twelve models gets a sixth of the sessions."""
_SESSION_MEAN = 1.5
_REPLAYS = 20
_SPREAD = 0.1
"""Of a replay's costs about those probed, either way."""


@dataclass(frozen=True, slots=True)
class Costs:
    """What was measured of a cluster at rest."""

    fixed_s: float
    """Of a request, beside its steps."""
    step_s: float
    """Of a step of one image."""
    marginal: float
    """What one more image in a step costs, as a share of the first."""
    load_s: float
    """Of a model's part in a denoiser."""
    load_spread: float
    """Deviation of the logarithm of single loads."""
    core_count: float
    """What two denoisers at work get done, in those of one alone: the cores that all stages share."""

    def between(self, other: "Costs") -> "Costs":
        """The mean of both."""
        return Costs(*((one + two) / 2 for one, two in zip(astuple(self), astuple(other), strict=True)))

    def slower(self, factor: float) -> "Costs":
        """On a machine that takes so many times as long for everything."""
        times = {"fixed_s": self.fixed_s, "step_s": self.step_s, "load_s": self.load_s}
        return replace(self, **{name: factor * seconds for name, seconds in times.items()})

    def about(self, rng: random.Random) -> "Costs":
        """Others that might have been probed just as well."""
        return Costs(*(each * rng.uniform(1 - _SPREAD, 1 + _SPREAD) for each in astuple(self)))


async def probe(config: ClusterConfig) -> Costs:
    """Draws alone what tells the costs apart."""
    folder = config.log_folder
    assert folder is not None
    async with LocalCluster(config) as cluster, Client(router_address=cluster.addresses.router) as client:
        loads_s, homes = await _loads_s(client, folder)
        seconds = await _seconds(client)
        core_count = await _core_count(client, homes)
    fixed_s, step_s = _line([seconds[1, steps] for steps in _PROBED_STEPS])
    _, step_of_many_s = _line([seconds[_PROBED_IMAGES, steps] for steps in _PROBED_STEPS])
    marginal = (step_of_many_s / step_s - 1) / (_PROBED_IMAGES - 1)
    load_spread = float(np.std(np.log(loads_s)))
    return Costs(fixed_s, step_s, marginal, statistics.median(loads_s), load_spread, core_count)


async def _loads_s(client: Client, folder: Path) -> tuple[list[float], list[str]]:
    """Of denoisers' parts of models that encoder and VAE have, or they would be slowed by theirs.

    Also returns a model on the device of each denoiser.
    """
    homes: dict[str, str] = {}
    before: list[float] = []
    for seed in range(2):
        before = loads(folder)
        for number, prompt in enumerate(distinct_prompts(MODEL_COUNT, seed)):
            await asyncio.sleep(_PAUSE_S)
            drawn = await client.draw(_probing(model_id(number), prompt, _PROBED_STEPS[0], 1))
            (replica_id,) = [stage.replica_id for stage in drawn.stages if stage.stage == "denoiser"]
            homes[replica_id] = model_id(number)
    return loads(folder)[len(before) :], list(homes.values())


async def _seconds(client: Client) -> dict[tuple[int, int], float]:
    """Of requests for so many images in so many steps, in turns: what the machine does meanwhile meets all alike."""
    times: dict[tuple[int, int], list[float]] = {
        (images, steps): [] for images in (1, _PROBED_IMAGES) for steps in _PROBED_STEPS
    }
    prompts = iter(distinct_prompts(_REPEATS * len(times), seed=2))
    for _ in range(_REPEATS):
        for (images, steps), taken in times.items():
            taken.append((await client.draw(_probing(model_id(0), next(prompts), steps, images))).total_s)
    return {each: statistics.median(taken[1:]) for each, taken in times.items()}


async def _core_count(client: Client, models: Sequence[str]) -> float:
    """Draws with models that different replicas have, one after the other, alone and beside each other."""
    prompts = iter(distinct_prompts(2 * _REPEATS * _IN_A_ROW * len(models), seed=3))

    async def draw(model: str) -> float:
        seconds = [
            (await client.draw(_probing(model, next(prompts), _STEP_COUNT, 1))).total_s for _ in range(_IN_A_ROW)
        ]
        return sum(seconds)

    worth = []
    for _ in range(_REPEATS):
        alone_s = sum([await draw(model) for model in models])
        beside_s = sum(await asyncio.gather(*map(draw, models)))
        worth.append(len(models) * alone_s / beside_s)
    return statistics.median(worth)


def _probing(model: str, prompt: str, steps: int, images: int) -> Drawing:
    """Prompts are never the same, or they would be in the encoder's cache."""
    task = Task(prompt=prompt, step_count=steps, guidance_scale=2.0, seed=0)
    return replace(task.drawing(model), image_count=images)


def _line(seconds: Sequence[float]) -> tuple[float, float]:
    """Where a line through the probes begins, and by how much it rises with a step."""
    rise, start = np.polyfit(_PROBED_STEPS, seconds, 1)
    return float(start), float(rise)


def simulate(costs: Costs, kind: EvictionKind, arrivals: Sequence[Arrival], model_bytes: int, seed: int) -> Outcome:
    """The same requests on virtual workers; equal seeds give equal times of loads."""
    requests = [
        Request(number=number, arrival_s=arrival.at_s, base=arrival.model_id, image_count=1, step_count=_STEP_COUNT)
        for number, arrival in enumerate(arrivals)
    ]
    warm_up = warm_up_count(arrivals)
    before, cluster = (_virtual(costs, kind, model_bytes, seed) for _ in range(2))
    before.replay(requests[:warm_up])
    jobs = sorted(cluster.replay(requests), key=lambda job: job.request.number)
    load_count = _load_count(cluster) - _load_count(before)
    latencies_s = [job.finish_s - job.request.arrival_s for job in jobs[warm_up:]]
    return Outcome(latencies_s, load_count, load_count * costs.load_s)


def _replays(costs: Costs, kind: EvictionKind, arrivals: Sequence[Arrival], model_bytes: int) -> list[Outcome]:
    rng = random.Random(0)
    return [simulate(costs.about(rng), kind, arrivals, model_bytes, seed) for seed in range(_REPLAYS)]


def _virtual(costs: Costs, kind: EvictionKind, model_bytes: int, seed: int) -> Cluster:
    loader = Loader(
        network_s=0.0,
        disk_s=costs.load_s,
        bus_s=0.0,
        attach_s=0.0,
        is_streaming=True,
        overlaps=True,
        spread=costs.load_spread,
    )
    names = tuple(map(model_id, range(MODEL_COUNT)))
    work = Work(fixed_s=costs.fixed_s, step_s=costs.step_s, marginal=costs.marginal)
    config = LiveConfig(loader=loader, work=work, eviction=kind, model_bytes=model_bytes, model_names=names)
    rooms = (float(ROOM_COUNT), 0.0, float(MODEL_COUNT))
    hardware = Hardware(worker_count=_DENOISER_COUNT, rooms=rooms, core_count=costs.core_count)
    return Cluster(Live(config), hardware, Sizes(0, spread=0.0), seed=seed)


def _load_count(cluster: Cluster) -> int:
    return sum(sum(worker.load_counts) for worker in cluster.workers)


def undisturbed_s(arrivals: Sequence[Arrival], live: Outcome) -> float:
    """Mean latency of the requests that overlapped no other."""
    starts_s = [arrival.at_s for arrival in arrivals[warm_up_count(arrivals) :]]
    ends_s = [start_s + latency_s for start_s, latency_s in zip(starts_s, live.latencies_s, strict=True)]
    lasts_s = itertools.accumulate(ends_s, max, initial=0.0)
    nexts_s = [*starts_s[1:], math.inf]
    spans = zip(lasts_s, starts_s, ends_s, nexts_s, strict=False)
    return statistics.fmean(
        end_s - start_s for last_s, start_s, end_s, next_s in spans if last_s < start_s < end_s < next_s
    )


class Compared(NamedTuple):
    """One figure of the cluster, and of the simulator."""

    live: float
    simulated: float
    """Mean of the replays."""
    deviation: float
    """Of single replays from it."""

    @property
    def agrees(self) -> bool:
        """Whether they differ by no more than they may."""
        return abs(self.simulated - self.live) <= _WITHIN * self.live


def compare(live: Outcome, replays: Sequence[Outcome]) -> dict[str, Compared]:
    """Live and simulated figures, by name."""
    simulated = [_figures(replay) for replay in replays]
    compared = {}
    for name, value in _figures(live).items():
        of_replays = [figures[name] for figures in simulated]
        compared[name] = Compared(value, statistics.fmean(of_replays), statistics.stdev(of_replays))
    return compared


def _figures(outcome: Outcome) -> dict[str, float]:
    return {
        "mean, s": statistics.fmean(outcome.latencies_s),
        "p95, s": quantile(outcome.latencies_s, 0.95),
        "found loaded": outcome.hit_rate,
        "loads": outcome.load_count,
    }


async def measure(options: argparse.Namespace, root: Path) -> dict[str, Any]:
    """The costs and the figures of each way."""
    store, count = root / "models", 40 if options.quick else options.count
    make_store(options.model_store / options.model, store)
    model_bytes = sum(file.stat().st_size for file in (store / model_id(0)).rglob("*.safetensors"))
    arrivals = stream(
        count, options.rate, seed=0, exponent=_EXPONENT, session_mean=_SESSION_MEAN, step_count=_STEP_COUNT
    )
    figures: dict[str, Any] = {}
    before = await probe(cluster_of("lru", store, root / "probe", _DENOISER_COUNT))
    for way, kind in WAYS.items():
        live = await serve(cluster_of(kind, store, root / way, _DENOISER_COUNT), arrivals)
        after = await probe(cluster_of(kind, store, root / f"probe after {way}", _DENOISER_COUNT))
        replays = partial(_replays, kind=kind, arrivals=arrivals, model_bytes=model_bytes)
        costs = before.between(after)
        at_rest_s = statistics.fmean(undisturbed_s(arrivals, replay) for replay in replays(costs))
        costs = costs.slower(undisturbed_s(arrivals, live) / at_rest_s)
        probed = [asdict(before), asdict(after)]
        figures[way] = {"probed": probed, "costs": asdict(costs), "compared": compare(live, replays(costs))}
        before = after
    return figures


def show(figures: dict[str, Any]) -> bool:
    """Prints the table. Returns whether everything agrees."""
    compared = {f"{way}: {name}": each for way in WAYS for name, each in figures[way]["compared"].items()}
    rows = [
        [name, f"{live:.3g}", f"{simulated:.3g} ± {deviation:.2g}", f"{simulated / live - 1:+.1%}" if live else ""]
        for name, (live, simulated, deviation) in compared.items()
    ]
    scene = f"{MODEL_COUNT} models, {_DENOISER_COUNT} denoisers with room for {ROOM_COUNT} each"
    table(scene, ("figure", "live", "simulated", "difference"), rows)
    return all(each.agrees for each in compared.values())


def main() -> None:
    """The bench."""
    parser = command_line("calibration", "Whether the simulator says what a live cluster does.")
    parser.add_argument("--count", type=int, default=600, help="requests")
    parser.add_argument("--rate", type=float, default=2.0, help="requests a second")
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
