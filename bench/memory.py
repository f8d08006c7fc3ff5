"""What every process of a cluster holds in memory: at the start, after 100 requests and after 1,000 in a row.

    python -m bench.memory

Requests have prompts of their own, so that the encoder's cache fills, and few steps: what leaks, leaks by the request.
Resident bytes count pages that processes share, such as torch's code, for each of them.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.progress import Progress

from bench.children import read_resident_bytes
from bench.report import command_line, console, finish, machine, table
from bench.tasks import Task, distinct_prompts
from darkroom.client import Client
from darkroom.runtime.cluster import ClusterConfig, LocalCluster

_CONTROL_PLANE = ("router", "cachemgr")
_CONTROL_LIMIT_BYTES = 150 << 20
_STAGE_LIMIT_BYTES = 900 << 20
_CLUSTER_LIMIT_BYTES = 4 << 30
_GROWTH_LIMIT_BYTES = 20 << 20
_IN_FLIGHT = 8
_STEP_COUNT = 2
_MIB = 1 << 20

Reading = dict[str, int]


async def draw_many(client: Client, model_id: str, prompts: Sequence[str], bars: Progress) -> None:
    """Draws one picture of every prompt, a few at the same time."""
    bar = bars.add_task(f"{len(prompts)} requests", total=len(prompts))
    left = iter(enumerate(prompts))

    async def draw() -> None:
        for seed, prompt in left:
            task = Task(prompt=prompt, step_count=_STEP_COUNT, guidance_scale=4.0, seed=seed)
            await client.draw(task.drawing(model_id))
            bars.advance(bar)

    await asyncio.gather(*(draw() for _ in range(_IN_FLIGHT)))


async def measure(config: ClusterConfig, model_id: str, counts: Sequence[int]) -> dict[str, Any]:
    """Resident bytes by request count, 0 first. Returns the figures."""
    prompts = distinct_prompts(counts[-1], seed=2)
    readings: dict[int, Reading] = {}
    async with LocalCluster(config) as cluster, Client(router_address=cluster.addresses.router) as client:
        readings[0] = read_resident_bytes(cluster)
        start_s = time.monotonic()
        with Progress(console=console, transient=True) as bars:
            for done, count in zip([0, *counts], counts, strict=False):
                await draw_many(client, model_id, prompts[done:count], bars)
                readings[count] = read_resident_bytes(cluster)
        drawing_s = time.monotonic() - start_s
    return summarise(readings, counts) | {"requests_per_s": counts[-1] / drawing_s}


def summarise(readings: Mapping[int, Reading], counts: Sequence[int]) -> dict[str, Any]:
    """The figures that the readings came to."""
    first, last = readings[counts[0]], readings[counts[-1]]
    return {
        "request_counts": [0, *counts],
        "resident_bytes": {name: [reading[name] for reading in readings.values()] for name in last},
        "growth_bytes": {name: last[name] - first[name] for name in last},
        "cluster_bytes": [sum(reading.values()) for reading in readings.values()],
    }


def limit_bytes(name: str) -> int | None:
    """The aim for a process; etcd has none of its own."""
    if name == "etcd":
        return None
    return _CONTROL_LIMIT_BYTES if name in _CONTROL_PLANE else _STAGE_LIMIT_BYTES


def show(figures: Mapping[str, Any]) -> None:
    """The table."""
    rows = []
    for name, resident in figures["resident_bytes"].items():
        limit, growth = limit_bytes(name), figures["growth_bytes"][name]
        verdict = _verdict(is_met=(limit is None or max(resident) <= limit) and growth <= _GROWTH_LIMIT_BYTES)
        rows.append([name, *map(_mib, resident), _mib(growth), "" if limit is None else _mib(limit), verdict])
    whole = figures["cluster_bytes"]
    verdict = _verdict(is_met=max(whole) <= _CLUSTER_LIMIT_BYTES)
    rows.append(["all", *map(_mib, whole), _mib(whole[-1] - whole[1]), _mib(_CLUSTER_LIMIT_BYTES), verdict])
    counts = figures["request_counts"]
    head = ["process", "start", *(f"after {n}" for n in counts[1:]), "growth", "limit", "aim"]
    table("Resident memory, MiB", head, rows)
    console.print(
        f"Requests of {_STEP_COUNT} steps, {_IN_FLIGHT} at a time, {figures['requests_per_s']:.1f} a second. "
        f"Aim: from {counts[1]} on, no process grows by more than {_mib(_GROWTH_LIMIT_BYTES)} MiB."
    )


def _mib(value_bytes: int) -> str:
    return f"{value_bytes / _MIB:.1f}"


def _verdict(*, is_met: bool) -> str:
    return "met" if is_met else "missed"


def main() -> None:
    """The bench."""
    given = command_line("memory", "What every process of a cluster holds in memory.").parse_args()
    on = machine()
    config = ClusterConfig(device=given.device, model_store=given.model_store, preload=(given.model,))
    figures = asyncio.run(measure(config, given.model, (8, 24) if given.quick else (100, 1000)))
    show(figures)
    finish("memory", on, figures)


if __name__ == "__main__":
    main()
