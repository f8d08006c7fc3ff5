"""How much faster sixteen mixed requests are done through a cluster than by plain diffusers, one after another.

    python -m bench.throughput

Requests of 10 to 30 steps, three schedulers, guidance scales and seeds of their own, all sent at once. Plain diffusers
draws the same requests in turn on the same cores, with one thread and with one per core; the faster counts. Beside it
stands the bound: the least time this mix can take, from the UNet's own cost curve measured in the same run, thrice,
the fastest of each size kept.
"""

import asyncio
import contextlib
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.bound import least_s
from bench.children import read_cpu
from bench.load import describe, other_cores, read_load
from bench.report import command_line, console, finish, machine, ratio_of_medians, spread, table
from bench.tasks import Task, mixed_tasks
from bench.worker import Worker, worker
from darkroom.client import Client, Drawn
from darkroom.runtime.cluster import ClusterConfig, LocalCluster
from darkroom.v1 import stage_pb2

AIM_RATIO = 1.3
_REQUEST_COUNT = 16
_CURVE_ROWS = (2, 4, 8, 16, 32)
_CORES = os.cpu_count() or 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Together:
    """The mix through the cluster, all at once."""

    whole_s: float
    finished_s: list[float]
    """When each request was done, from the start."""
    batched_share: float
    """Of all forwards, how many shared a batch with another request's."""
    forwards_per_batch: float
    cpu_s: dict[str, float]


@dataclass(frozen=True, slots=True)
class Round:
    """The mix drawn once by every side."""

    together: Together
    plain: dict[int, list[dict[str, Any]]]
    """What plain diffusers says of each request, by its thread count."""
    side_by_side_s: float
    """As many plain processes as there are denoisers, each drawing one request after another."""

    def plain_s(self, threads: int) -> float:
        """Seconds that plain diffusers was drawing."""
        return sum(float(times["total_s"]) for times in self.plain[threads])


@dataclass(frozen=True, slots=True)
class Sides:
    """The cluster, plain diffusers by thread count, and one process for each denoiser that measures the UNet."""

    cluster: LocalCluster
    client: Client
    model_id: str
    plain: Mapping[int, Worker]
    side_by_side: Sequence[Worker]
    probes: Sequence[Worker]

    async def draw_together(self, tasks: Sequence[Task]) -> Together:
        """All tasks at once through the cluster."""
        forwards, batches = await self.count_forwards()
        before = read_cpu(self.cluster)
        start_s = time.perf_counter()

        async def draw(task: Task) -> tuple[Drawn, float]:
            drawn = await self.client.draw(task.drawing(self.model_id))
            return drawn, time.perf_counter() - start_s

        done = await asyncio.gather(*(draw(task) for task in tasks))
        whole_s, after = time.perf_counter() - start_s, read_cpu(self.cluster)
        forwards_after, batches_after = await self.count_forwards()
        return Together(
            whole_s=whole_s,
            finished_s=[finished_s for _, finished_s in done],
            batched_share=sum(drawn.batched_forward_count for drawn, _ in done) / sum(t.step_count for t in tasks),
            forwards_per_batch=(forwards_after - forwards) / (batches_after - batches),
            cpu_s=before.until(after),
        )

    async def count_forwards(self) -> tuple[int, int]:
        """Forwards and batches that the denoisers have run so far."""
        reports = await self.client.replicas()
        states = [r.state for r in reports if r.state and r.listed.stage == stage_pb2.STAGE_DENOISER]
        return sum(state.forward_count for state in states), sum(state.batch_count for state in states)

    async def draw_in_turn(self, threads: int, tasks: Sequence[Task]) -> list[dict[str, Any]]:
        """One task after another by plain diffusers."""
        return [await self.plain[threads].ask(**asdict(task)) for task in tasks]

    async def draw_side_by_side(self, tasks: Sequence[Task]) -> float:
        """All tasks by several plain processes, each taking the next when it is done. Returns seconds."""
        left = iter(tasks)
        start_s = time.perf_counter()

        async def draw(process: Worker) -> None:
            for task in left:
                await process.ask(**asdict(task))

        await asyncio.gather(*(draw(process) for process in self.side_by_side))
        return time.perf_counter() - start_s

    async def round(self, number: int) -> Round:
        """The mix on every side; the cluster goes first, in the middle and last by turns."""
        tasks = mixed_tasks(_REQUEST_COUNT, number)
        order = list(self.plain)
        place = number % (len(order) + 1)
        plain = {threads: await self.draw_in_turn(threads, tasks) for threads in order[:place]}
        together = await self.draw_together(tasks)
        plain |= {threads: await self.draw_in_turn(threads, tasks) for threads in order[place:]}
        return Round(together, plain, await self.draw_side_by_side(tasks))

    async def curves(self, window_s: float) -> dict[str, dict[int, float]]:
        """Seconds of a UNet forward by rows: with one process at it, and with all at the same time."""
        return {
            "one": {rows: await _forward_s(self.probes[:1], rows, window_s) for rows in _CURVE_ROWS},
            "all": {rows: await _forward_s(self.probes, rows, window_s) for rows in _CURVE_ROWS},
        }


async def _forward_s(probes: Sequence[Worker], rows: int, window_s: float) -> float:
    answers = await asyncio.gather(*(probe.ask(rows=rows, window_s=window_s) for probe in probes))
    return statistics.fmean(float(answer["forward_s"]) for answer in answers)


async def measure(sides: Sides, round_count: int, window_s: float) -> dict[str, Any]:
    """Rounds after one that does not count, the cost curves before, amid and after them. Returns the figures."""
    numbers = range(1, round_count + 1)
    half = (round_count + 1) // 2
    load = read_load()
    with console.status(f"{round_count} rounds of {_REQUEST_COUNT} requests, and the UNet's cost curve…"):
        await sides.round(0)
        curves = [await sides.curves(window_s)]
        rounds = [await sides.round(number) for number in numbers[:half]]
        curves.append(await sides.curves(window_s))
        rounds += [await sides.round(number) for number in numbers[half:]]
        curves.append(await sides.curves(window_s))
    least = {name: {n: min(read[name][n] for read in curves) for n in _CURVE_ROWS} for name in curves[0]}
    figures = summarise(rounds) | {"other_cores": other_cores(load, read_load()), "unet_forward_s": least}
    return figures | bounds(least["all"], len(sides.probes), figures)


def summarise(rounds: Sequence[Round]) -> dict[str, Any]:
    """The figures that the rounds came to."""
    plain = {threads: [played.plain_s(threads) for played in rounds] for threads in rounds[0].plain}
    best = min(plain, key=lambda threads: statistics.median(plain[threads]))
    together = [played.together for played in rounds]
    cluster = [one.whole_s for one in together]
    alone = [times for played in rounds for times in played.plain[1]]
    cpu = {name: statistics.median(one.cpu_s[name] for one in together) for name in together[0].cpu_s}
    return {
        "round_count": len(rounds),
        "request_count": _REQUEST_COUNT,
        "cluster": spread(cluster),
        "plain": {threads: spread(times) for threads, times in plain.items()},
        "plain_thread_count": best,
        "side_by_side": spread([played.side_by_side_s for played in rounds]),
        "speedup": asdict(ratio_of_medians(plain[best], cluster)),
        "batched_share": statistics.fmean(one.batched_share for one in together),
        "forwards_per_batch": statistics.fmean(one.forwards_per_batch for one in together),
        "cpu_s": cpu,
        "busy_cores": sum(cpu.values()) / statistics.median(cluster),
        "encode_and_decode_s": statistics.median(t.get("encode_s", 0.0) + t.get("vae_s", 0.0) for t in alone),
        "picture_p50_s": {
            "cluster": statistics.median(at_s for one in together for at_s in one.finished_s),
            "plain": statistics.median(at_s for played in rounds for at_s in _sums(played.plain[best])),
        },
    }


def _sums(answers: Sequence[Mapping[str, float]]) -> list[float]:
    """When each request was done, one after another."""
    return [sum(times["total_s"] for times in answers[: place + 1]) for place in range(len(answers))]


def bounds(forward_s: Mapping[int, float], denoisers: int, figures: Mapping[str, Any]) -> dict[str, Any]:
    """Least seconds for the mix: the UNet alone, and with encoding and decoding spread over the cores."""
    steps = [task.step_count for task in mixed_tasks(_REQUEST_COUNT, 0)]
    unet_s = least_s(steps, forward_s, denoisers)
    whole_s = unet_s + _REQUEST_COUNT * figures["encode_and_decode_s"] / _CORES
    reached_s = figures["cluster"]["p50_s"]
    return {
        "step_count": sum(steps),
        "denoiser_count": denoisers,
        "bound": {"unet_s": unet_s, "with_encode_and_decode_s": whole_s},
        "bound_share": {"unet": unet_s / reached_s, "with_encode_and_decode": whole_s / reached_s},
    }


def show(figures: Mapping[str, Any], layout: str) -> None:
    """The tables."""
    head = ["side", "p50 s", "min", "max", "requests/s"]
    table(f"{_REQUEST_COUNT} mixed requests, {figures['round_count']} rounds", head, _side_rows(figures, layout))
    curves = figures["unet_forward_s"]
    cells = [[str(n), *(f"{1000 * curves[name][n] / n:.2f}" for name in ("one", "all"))] for n in _CURVE_ROWS]
    table("The UNet's cost, ms per row", ["rows", "one process", "all denoisers at once"], cells)
    cpu = [[name, f"{spent_s:.2f}"] for name, spent_s in figures["cpu_s"].items()]
    table("CPU of each process per round, s", ["process", "s"], cpu)
    gain, share = figures["speedup"], figures["bound_share"]
    console.print(
        f"{gain['value']:.2f} times plain diffusers ({gain['low']:.2f} to {gain['high']:.2f}), aim {AIM_RATIO}. "
        f"{share['unet']:.0%} of the UNet's bound, {share['with_encode_and_decode']:.0%} with encoding and decoding. "
        f"{figures['forwards_per_batch']:.1f} forwards a batch; {figures['busy_cores']:.2f} cores busy. "
        f"{describe(figures['other_cores'])}"
    )


def _side_rows(figures: Mapping[str, Any], layout: str) -> list[list[str]]:
    sides = {
        f"cluster: {layout}": figures["cluster"],
        **{f"plain diffusers, {_threads(n)}": times for n, times in figures["plain"].items()},
        f"{figures['denoiser_count']} plain processes side by side": figures["side_by_side"],
    }
    measured = [[name, *(f"{times[k]:.2f}" for k in ("p50_s", "min_s", "max_s"))] for name, times in sides.items()]
    least = [[f"bound: {name[:-2].replace('_', ' ')}", f"{s:.2f}", "", ""] for name, s in figures["bound"].items()]
    return [[*row, f"{_REQUEST_COUNT / float(row[1]):.2f}"] for row in (*measured, *least)]


def _threads(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"


async def compare(config: ClusterConfig, model_id: str, round_count: int, window_s: float) -> dict[str, Any]:
    """Starts all sides and returns the figures, tables shown."""
    folder = Path(config.model_store) / model_id
    async with contextlib.AsyncExitStack() as stack:

        async def start(name: str, module: str, threads: int) -> Worker:
            beside = worker(name, f"bench.{module}", folder, device=config.device, threads=threads)
            return await stack.enter_async_context(beside)

        cluster = await stack.enter_async_context(LocalCluster(config))
        addresses = cluster.addresses
        client = Client(router_address=addresses.router, cachemgr_address=addresses.cachemgr)
        await stack.enter_async_context(client)
        numbers = range(1, config.denoisers + 1)
        plain = {threads: await start(f"plain-{threads}", "plain", threads) for threads in sorted({1, _CORES})}
        side_by_side = [await start(f"beside-{number}", "plain", config.threads) for number in numbers]
        probes = [await start(f"cost-{number}", "cost", config.threads) for number in numbers]
        figures = await measure(Sides(cluster, client, model_id, plain, side_by_side, probes), round_count, window_s)
    layout = (
        f"{config.encoders} encoder, {config.denoisers} denoiser, {config.vaes} vae, {_threads(config.threads)} each"
    )
    show(figures, layout)
    return {"layout": layout, **figures}


def main() -> None:
    """The bench."""
    parser = command_line("throughput", "How much faster mixed requests are done together.")
    parser.add_argument("--rounds", type=int, help="7 unless told, 1 if quick")
    for stage, count in (("encoders", 1), ("denoisers", 2), ("vaes", 1)):
        parser.add_argument(f"--{stage}", type=int, default=count, help=f"{stage[:-1]} replicas")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of each stage")
    given = parser.parse_args()
    on = machine()
    config = ClusterConfig(
        encoders=given.encoders,
        denoisers=given.denoisers,
        vaes=given.vaes,
        threads=given.threads,
        device=given.device,
        model_store=given.model_store,
        preload=(given.model,),
    )
    round_count, window_s = given.rounds or (1 if given.quick else 7), 0.3 if given.quick else 2.0
    finish("throughput", on, asyncio.run(compare(config, given.model, round_count, window_s)))


if __name__ == "__main__":
    main()
