"""Live step batching beside plain diffusers and beside batching of whole requests: same requests, same arrivals.

    python -m bench.stepbatch

Mixed requests: 4 to 50 steps, three schedulers, two sizes, two models, three in ten with a LoRA, all guided. First all
of them wait at once, which gives each side's capacity. Then they come as a Poisson stream, at 0.5, 0.8 and 1.2 times
what plain diffusers managed. Denoising only, one thread and one process a side; the sides take turns.
"""

import argparse
import asyncio
import contextlib
import math
import statistics
import tempfile
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.status import Status
from safetensors.torch import load_file

from bench.load import describe, other_cores, read_load
from bench.report import FOLDER, command_line, console, finish, machine
from bench.stepbatch_mix import MOST_STEPS, SIDES_PX, Curve, Wanted, arrivals_s, stream
from bench.stepbatch_plot import write_plot
from bench.stepbatch_report import BACKLOG, Run, profile_table, show, summarise
from bench.stepbatch_store import make_store
from bench.worker import Answer, Worker, worker

SIDES = ("plain", "requests, strict", "requests", "darkroom")
ORDERS = ("oldest first", "largest first")
"""Sides that differ from Darkroom by their order only: not at every load."""
LOADS = (0.5, 0.8, 1.2)
_LOADS_OF_ORDERS = (0.8, 1.2)
_CURVE_ROWS = (2, 4, 6, 8, 12, 16, 24, 32)
_PX_PER_LATENT = 8
_TIMEOUT_S = 3600.0
_WARM_UP_SEED = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How much is measured."""

    loads: tuple[float, ...]
    rounds: int
    request_count: int
    most_steps: int
    window_s: float


@dataclass(slots=True)
class Bench:
    """The side processes, and what they have done so far."""

    workers: Mapping[str, Worker]
    plan: Plan
    folder: Path
    runs: list[Run]
    curves: list[dict[int, Curve]]

    async def measure(self) -> None:
        """Everything, after a warm-up that does not count."""
        streams = [stream(self.plan.request_count, seed, self.plan.most_steps) for seed in range(self.plan.rounds)]
        with console.status("Warming up…") as status:
            for name, side in self.workers.items():
                await _serve(side, stream(12, _WARM_UP_SEED, 6), [0.0] * 12)
                status.update(f"Warming up: {name} is ready…")
            for number, requests in enumerate(streams):
                await self._round(number, requests, status)

    async def _round(self, number: int, requests: Sequence[Wanted], status: Status) -> None:
        self.curves.append(await self._measure_curves(status))
        for name in self._turns(number, self.workers):
            await self._run(name, number, requests, status)
        rate = len(requests) / statistics.fmean(r.whole_s for r in self.runs if (r.side, r.load) == ("plain", BACKLOG))
        for load in self.plan.loads:
            sides = [name for name in self.workers if name not in ORDERS or load in _LOADS_OF_ORDERS]
            for name in self._turns(number, sides):
                await self._run(name, number, requests, status, load=load, rate=load * rate)
        self.curves.append(await self._measure_curves(status))

    def _turns(self, number: int, sides: Iterable[str]) -> list[str]:
        """The sides, another one first in each round."""
        names = list(sides)
        start = number % len(names)
        return names[start:] + names[:start]

    async def _run(
        self,
        name: str,
        number: int,
        requests: Sequence[Wanted],
        status: Status,
        *,
        load: float = BACKLOG,
        rate: float = math.inf,
    ) -> None:
        status.update(f"Round {number + 1} of {self.plan.rounds}, {_named(load)}: {name}…")
        latents = str(self.folder / f"{number}-{name}.safetensors") if load == BACKLOG else ""
        arrivals = arrivals_s(requests, rate)
        before = read_load()
        answer = await _serve(self.workers[name], requests, arrivals, latents=latents)
        busy = other_cores(before, read_load())
        self.runs.append(Run.of(name, number, load, requests, answer, other_cores=busy))

    async def _measure_curves(self, status: Status) -> dict[int, Curve]:
        status.update("The UNet's cost curve…")
        return {side_px: {rows: await self._forward_s(side_px, rows) for rows in _CURVE_ROWS} for side_px in SIDES_PX}

    async def _forward_s(self, side_px: int, rows: int) -> float:
        question = {"latent_side": side_px // _PX_PER_LATENT, "rows": rows, "window_s": self.plan.window_s}
        answer = await next(iter(self.workers.values())).ask(_TIMEOUT_S, do="cost", **question)
        return float(answer["forward_s"])

    def least_curves(self) -> dict[int, Curve]:
        """By size of image, the fastest reading of each number of rows."""
        return {
            side_px: {rows: min(read[side_px][rows] for read in self.curves) for rows in _CURVE_ROWS}
            for side_px in SIDES_PX
        }

    def errors(self) -> dict[str, float]:
        """How far each side's latents are from plain diffusers', relative to their norm: the largest of any request."""
        return {name: max(self._error(name, number) for number in range(self.plan.rounds)) for name in self.workers}

    def _error(self, name: str, number: int) -> float:
        found, right = (load_file(self.folder / f"{number}-{side}.safetensors") for side in (name, "plain"))
        return max(float((found[key] - right[key]).norm() / right[key].norm()) for key in right)


def _named(load: float) -> str:
    return "all at once" if load == BACKLOG else f"load {load:g}"


async def _serve(side: Worker, requests: Sequence[Wanted], arrivals: list[float], *, latents: str = "") -> Answer:
    asked = [asdict(wanted) for wanted in requests]
    return await side.ask(_TIMEOUT_S, do="serve", requests=asked, arrivals_s=arrivals, latents=latents)


@contextlib.asynccontextmanager
async def _side_processes(
    names: Sequence[str], store: Path, *, is_profiled: bool = False
) -> AsyncGenerator[Mapping[str, Worker], None]:
    """A process for each side, its models loaded."""
    async with contextlib.AsyncExitStack() as stack:
        workers: dict[str, Worker] = {}
        with console.status("Starting…") as status:
            for name in names:
                status.update(f"Starting {name}…")
                file_name = f"stepbatch-{name.replace(', ', '-').replace(' ', '-')}"
                beside = worker(file_name, "bench.stepbatch_sides", store, device="cpu", threads=1)
                workers[name] = await stack.enter_async_context(beside)
                await workers[name].ask(do="prepare", side=name, is_profiled=is_profiled)
        yield workers


async def compare(plan: Plan, source: Path, sides: Sequence[str], plot: Path) -> dict[str, Any]:
    """All sides by turns. Returns the figures, tables shown and the plot written."""
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder)
        make_store(source, store)
        async with _side_processes(sides, store) as workers:
            bench = Bench(workers, plan, store, [], [])
            before = read_load()
            await bench.measure()
            busy = other_cores(before, read_load())
            figures = summarise(bench.runs, bench.least_curves(), bench.errors())
    show(figures)
    write_plot(plot, figures)
    console.print(f"Plot: {plot}. {describe(busy)}")
    return {"plan": asdict(plan), "other_cores": busy, **figures}


async def profile(plan: Plan, source: Path) -> dict[str, Any]:
    """Darkroom alone, all requests at once, the engine's time booked part by part. Returns seconds by part."""
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder)
        make_store(source, store)
        async with _side_processes(["darkroom"], store, is_profiled=True) as workers:
            await _serve(workers["darkroom"], stream(12, _WARM_UP_SEED, 6), [0.0] * 12)
            requests = stream(plan.request_count, 0, plan.most_steps)
            answer = await _serve(workers["darkroom"], requests, [0.0] * len(requests))
    return profile_table(answer, sum(wanted.step_count for wanted in requests))


def _plan(given: argparse.Namespace) -> Plan:
    return Plan(
        loads=(LOADS[1], LOADS[2]) if given.quick else LOADS,
        rounds=given.rounds or (1 if given.quick else 2),
        request_count=given.requests or (10 if given.quick else 30),
        most_steps=12 if given.quick else MOST_STEPS,
        window_s=0.1 if given.quick else 0.5,
    )


def main() -> None:
    """The bench."""
    parser = command_line("stepbatch", "Step batching beside plain diffusers and batching of whole requests.")
    parser.add_argument("--rounds", type=int, help="streams of each load; 2 unless told, 1 if quick")
    parser.add_argument("--requests", type=int, help="of each stream; 30 unless told, 10 if quick")
    parser.add_argument("--no-orders", action="store_true", help="leave out the sides that differ by their order only")
    parser.add_argument("--profile", action="store_true", help="only book the engine's time, part by part")
    parser.add_argument("--plot", type=Path, default=FOLDER / "stepbatch.svg", help="where the SVG goes")
    given = parser.parse_args()
    on, plan, source = machine(), _plan(given), given.model_store / given.model
    if given.profile:
        finish("stepbatch_profile", on, asyncio.run(profile(plan, source)))
    else:
        sides = SIDES if given.no_orders else (*SIDES, *ORDERS)
        finish("stepbatch", on, asyncio.run(compare(plan, source, sides, given.plot)))


if __name__ == "__main__":
    main()
