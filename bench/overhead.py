"""What five services cost a single request, beside plain diffusers in one process of as many threads.

    python -m bench.overhead

Sides take turns request by request, each turn starting with another side, so that a slow moment of the machine meets
all of them. The services' time is the client's: from the call until the PNG is there. Plain diffusers' time is that of
`pipeline(...)` alone, up to the PIL image.
"""

import asyncio
import contextlib
import hashlib
import io
import statistics
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from bench.children import read_cpu
from bench.load import describe, other_cores, read_load
from bench.report import command_line, console, finish, machine, quantile, ratio_of_medians, table
from bench.tasks import Task, distinct_prompts
from bench.worker import Worker, worker
from darkroom.client import Client, Drawn
from darkroom.runtime.cluster import ClusterConfig, LocalCluster

AIM_RATIO, GOAL_RATIO = 1.10, 1.03
_THREADS = 1
_WARM_UP_COUNT = 3
_IDLE_S = 3.0
_REPEATED_PROMPT = "a large red circle in the center on a white background"


@dataclass(frozen=True, slots=True)
class Turn:
    """One task on every side."""

    services: Drawn
    services_s: float
    repeated_s: float
    """With a prompt whose embedding the encoder still has."""
    plain: dict[str, Any]
    inside: dict[str, Any]

    @property
    def is_same_picture(self) -> bool:
        """Whether services and plain diffusers drew the same pixels."""
        pixels = Image.open(io.BytesIO(self.services.images[0])).convert("RGB").tobytes()
        return hashlib.sha256(pixels).hexdigest() == str(self.plain["digest"])


@dataclass(frozen=True, slots=True)
class Sides:
    """The ways to draw a task."""

    client: Client
    model_id: str
    plain: Worker
    inside: Worker

    async def services(self, task: Task) -> tuple[Drawn, float]:
        """Draws through the five services. Returns the client's time in seconds with it."""
        start_s = time.perf_counter()
        drawn = await self.client.draw(task.drawing(self.model_id))
        return drawn, time.perf_counter() - start_s

    async def turn(self, number: int, task: Task, known: Task) -> Turn:
        """Every side once, starting with another one each turn; `known` has a prompt seen before."""
        answers: dict[str, Any] = {}
        runs: dict[str, Callable[[], Awaitable[Any]]] = {
            "services": lambda: self.services(task),
            "plain": lambda: self.plain.ask(**asdict(task)),
            "repeated": lambda: self.services(known),
            "inside": lambda: self.inside.ask(**asdict(task)),
        }
        order = list(runs)
        for place in range(len(order)):
            name = order[(number + place) % len(order)]
            answers[name] = await runs[name]()
        services, services_s = answers["services"]
        return Turn(services, services_s, answers["repeated"][1], answers["plain"], answers["inside"])


async def measure(sides: Sides, count: int, step_count: int, guidance_scale: float) -> list[Turn]:
    """`count` turns with the model's defaults, after a few that do not count."""
    prompts = distinct_prompts(_WARM_UP_COUNT + count, seed=1)
    turns = []
    with console.status(f"{count} requests on each side, one at a time…"):
        for number, prompt in enumerate(prompts):
            tasks = [
                Task(prompt=text, step_count=step_count, guidance_scale=guidance_scale, seed=number)
                for text in (prompt, _REPEATED_PROMPT)
            ]
            turns.append(await sides.turn(number, *tasks))
    return turns[_WARM_UP_COUNT:]


def breakdown(turns: Sequence[Turn], step_count: int) -> dict[str, dict[str, float]]:
    """Medians in seconds of where a request's time goes: by part, and by side."""
    columns = {
        "plain": [_plain_parts(turn, step_count) for turn in turns],
        "inside": [_inside_parts(turn, step_count) for turn in turns],
        "run": [{time.stage: time.run_s for time in turn.services.stages} for turn in turns],
        "call": [_call_parts(turn) for turn in turns],
    }
    parts: dict[str, dict[str, float]] = {}
    for side, readings in columns.items():
        for part in readings[0]:
            parts.setdefault(part, {})[side] = statistics.median(reading[part] for reading in readings)
    return parts


def _plain_parts(turn: Turn, step_count: int) -> dict[str, float]:
    """Whatever is neither encoding nor decoding counts as denoising."""
    times = turn.plain
    denoise_s = times["total_s"] - times.get("encode_s", 0.0) - times.get("vae_s", 0.0)
    return {
        "encoder": times.get("encode_s", 0.0),
        "denoiser": denoise_s,
        "vae": times.get("vae_s", 0.0),
        **_loop_parts(times, denoise_s, step_count),
        "png": times["png_s"],
        "total": times["total_s"],
    }


def _inside_parts(turn: Turn, step_count: int) -> dict[str, float]:
    times = turn.inside
    parts = {"encoder": times["encode_s"], "denoiser": times["denoise_s"], "vae": times["decode_s"]}
    return {
        **parts,
        **_loop_parts(times, times["denoise_s"], step_count),
        "png": times["png_s"],
        "total": sum(parts.values()),
    }


def _loop_parts(times: Mapping[str, float], denoise_s: float, step_count: int) -> dict[str, float]:
    """Denoising split into the network and, for each step, what is around it."""
    if "unet_s" not in times:
        return {}
    return {"unet": times["unet_s"], "around a step": (denoise_s - times["unet_s"]) / step_count}


def _call_parts(turn: Turn) -> dict[str, float]:
    """What each hop costs beyond the work behind it."""
    drawn = turn.services
    return {
        **{time.stage: time.call_s - time.run_s for time in drawn.stages},
        "router": drawn.total_s - sum(time.call_s for time in drawn.stages),
        "client": turn.services_s - drawn.total_s,
        "total": turn.services_s,
    }


def show(turns: Sequence[Turn], figures: Mapping[str, Any]) -> None:
    """The tables."""
    rows = []
    for name in ("services", "repeated", "plain"):
        side = figures[name]
        rows.append(
            [_NAMES[name], *(f"{1000 * side[key]:.1f}" for key in ("p50_s", "p90_s")), _shown(side.get("ratio"))]
        )
    table(f"One request at a time, {len(turns)} turns", ["side", "p50 ms", "p90 ms", "ratio of medians (95 %)"], rows)
    parts: Mapping[str, Mapping[str, float]] = figures["parts_s"]
    head = ["part", "plain", "programs, one process", "stage says", "call on top"]
    sides = ("plain", "inside", "run", "call")
    cells = [[part, *(_milliseconds(times.get(side)) for side in sides)] for part, times in parts.items()]
    table("Where the time goes, medians in ms", head, cells)
    cpu = [[name, f"{1000 * spent_s:.1f}"] for name, spent_s in figures["cpu_s_per_request"].items()]
    table("CPU of each process per request, ms", ["process", "ms"], cpu)
    console.print(
        f"Aim {AIM_RATIO:.2f}, goal {GOAL_RATIO:.2f}. Equal pixels in {figures['same_picture_count']} of {len(turns)}. "
        f"The idle cluster keeps {figures['idle_cores']:.3f} cores busy. {describe(figures['other_cores'])}"
    )


_NAMES = {"services": "services", "repeated": "services, prompt seen before", "plain": "plain diffusers"}


def _milliseconds(value_s: float | None) -> str:
    return "" if value_s is None else f"{1000 * value_s:.2f}"


def _shown(ratio: Mapping[str, float] | None) -> str:
    return "1" if ratio is None else f"{ratio['value']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})"


def summarise(turns: Sequence[Turn], step_count: int) -> dict[str, Any]:
    """The figures that the turns came to."""
    plain = [float(turn.plain["total_s"]) for turn in turns]
    sides = {"services": [turn.services_s for turn in turns], "repeated": [turn.repeated_s for turn in turns]}
    figures: dict[str, Any] = {"turn_count": len(turns), "plain": _quantiles(plain)}
    for name, times in sides.items():
        figures[name] = _quantiles(times) | {"ratio": asdict(ratio_of_medians(times, plain))}
    figures["same_picture_count"] = sum(turn.is_same_picture for turn in turns)
    figures["parts_s"] = breakdown(turns, step_count)
    return figures


def _quantiles(times: Sequence[float]) -> dict[str, Any]:
    return {"p50_s": statistics.median(times), "p90_s": quantile(times, 0.9)}


async def compare(config: ClusterConfig, model_id: str, turn_count: int) -> dict[str, Any]:
    """Starts all sides, lets them take turns, and returns the figures, tables shown."""
    folder = Path(config.model_store) / model_id
    async with contextlib.AsyncExitStack() as stack:
        cluster = await stack.enter_async_context(LocalCluster(config))
        addresses = cluster.addresses
        client = Client(router_address=addresses.router, cachemgr_address=addresses.cachemgr)
        await stack.enter_async_context(client)
        beside = [
            await stack.enter_async_context(
                worker(name, f"bench.{name}", folder, device=config.device, threads=_THREADS)
            )
            for name in ("plain", "inside")
        ]
        model = next(model for model in (await client.catalogue()).models if model.model_id == model_id)
        before = read_cpu(cluster)
        await asyncio.sleep(_IDLE_S)
        idle = read_cpu(cluster)
        defaults = model.default_step_count, model.default_guidance_scale
        load = read_load()
        turns = await measure(Sides(client, model_id, *beside), turn_count, *defaults)
        others, spent = other_cores(load, read_load()), idle.until(read_cpu(cluster))
    drawn_count = 2 * (len(turns) + _WARM_UP_COUNT)
    figures = summarise(turns, defaults[0]) | {
        "step_count": defaults[0],
        "guidance_scale": defaults[1],
        "other_cores": others,
        "idle_cores": before.share_until(idle),
        "cpu_s_per_request": {name: spent_s / drawn_count for name, spent_s in spent.items()},
    }
    show(turns, figures)
    return figures


def main() -> None:
    """The bench."""
    parser = command_line("overhead", "What five services cost a single request.")
    parser.add_argument("--turns", type=int, help="requests on each side; 100 unless told, 5 if quick")
    given = parser.parse_args()
    on = machine()
    config = ClusterConfig(
        denoisers=1, threads=_THREADS, device=given.device, model_store=given.model_store, preload=(given.model,)
    )
    turn_count = given.turns or (5 if given.quick else 100)
    finish("overhead", on, asyncio.run(compare(config, given.model, turn_count)))


if __name__ == "__main__":
    main()
