"""What order of forwards is best: `policy/stepbatch` beside others, one replica, simulated on a virtual clock.

    python -m bench.stepbatch_policy

Poisson arrivals of mixed requests (4 to 50 steps, one or two rows, two models of two image sizes) at shares of what the
replica does without batching. Every order sees the same arrivals; a batch takes what the cost curve says, give or take
5 %. Darkroom's order starts knowing nothing and learns the curve from its batches.
"""

import math
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from bench.report import command_line, console, finish, machine, quantile, table
from darkroom.policy.cost import CostCurve
from darkroom.policy.stepbatch import WaitingForward, choose_batch

MAX_ROWS = 16
LOADS = (0.5, 0.8, 1.2)
_NOISE = 0.05
_KINDS = {"model 1, small": 1.0, "model 1, large": 2.5, "model 2, small": 1.4, "model 2, large": 3.5}
"""How much longer a forward of each takes than one of the first."""
_CURVES: dict[str, Callable[[int], float]] = {
    "6 ms + 1.5 ms a row: a CPU, large nets": lambda rows: 0.006 + 0.0015 * rows,
    "2.2 ms + 2 ms a row: a CPU, small nets": lambda rows: 0.0022 + 0.002 * rows,
    "20 ms up to 8 rows, then 2.5 ms a row: a GPU": lambda rows: 0.020 * max(1.0, rows / 8),
    "3 ms a row: batching gains nothing": lambda rows: 0.003 * rows,
}


@dataclass(slots=True, kw_only=True, eq=False)
class Request:
    """A request on the virtual clock."""

    kind: str
    rows: int
    steps_left: int
    arrived_s: float
    deadline_s: float
    waiting_since_s: float
    done_s: float = math.nan

    @property
    def latency_s(self) -> float:
        """Seconds from arrival to the last step."""
        return self.done_s - self.arrived_s


Choose: TypeAlias = Callable[[list[Request], float], Sequence[int]]
"""Positions of the forwards to run now, of all that wait in order of age."""


@dataclass(slots=True)
class Replica:
    """Runs batches, one after another."""

    curve: Callable[[int], float]
    rng: random.Random
    now_s: float = 0.0
    batch_count: int = 0
    forward_count: int = 0
    costs: CostCurve = field(default_factory=CostCurve)

    def forward_s(self, kind: str, rows: int) -> float:
        """True seconds of a forward, before noise."""
        return _KINDS[kind] * self.curve(rows)

    def run(self, batch: Sequence[Request]) -> None:
        """One forward of each, to its end."""
        kind, rows = batch[0].kind, sum(request.rows for request in batch)
        assert {request.kind for request in batch} == {kind}
        took_s = self.forward_s(kind, rows) * self.rng.lognormvariate(0.0, _NOISE)
        self.costs.add(kind, rows, took_s)
        self.now_s += took_s
        self.batch_count += 1
        self.forward_count += len(batch)
        for request in batch:
            request.steps_left -= 1
            request.waiting_since_s = request.done_s = self.now_s

    def serve(self, requests: Sequence[Request], choose: Choose) -> None:
        """All requests, each from its arrival on."""
        coming = iter(requests)
        following = next(coming, None)
        waiting: list[Request] = []
        while waiting or following:
            while following and (following.arrived_s <= self.now_s or not waiting):
                self.now_s = max(self.now_s, following.arrived_s)
                waiting.append(following)
                following = next(coming, None)
            positions = choose(waiting, self.now_s)
            batch = [waiting[position] for position in positions]
            self.run(batch)
            taken = set(positions)
            waiting = [request for position, request in enumerate(waiting) if position not in taken]
            waiting += [request for request in batch if request.steps_left]


def one_by_one(_: Replica) -> Choose:
    """Plain diffusers: a request to its end, then the next."""
    return lambda waiting, _: [min(range(len(waiting)), key=lambda position: waiting[position].arrived_s)]


def request_level(_: Replica) -> Choose:
    """Dynamic batching of requests: a batch is formed when the last one is done, and nobody joins it under way.

    Kinder than what is in use: requests of different step counts share a batch, and leave it when they are done.
    """
    batch: list[Request] = []

    def choose(waiting: list[Request], _: float) -> list[int]:
        staying = [position for position, request in enumerate(waiting) if request in batch]
        if not staying:
            oldest = min(range(len(waiting)), key=lambda position: waiting[position].arrived_s)
            staying = _with_company(waiting, oldest)
            batch[:] = [waiting[position] for position in staying]
        return staying

    return choose


def oldest_forward(_: Replica) -> Choose:
    """The forward that waited longest leads, and takes along what fits with it."""
    return lambda waiting, _: _with_company(waiting, 0)


def largest_group(_: Replica) -> Choose:
    """The kind with most rows waiting."""

    def choose(waiting: list[Request], _: float) -> list[int]:
        rows = {kind: sum(request.rows for request in waiting if request.kind == kind) for kind in _KINDS}
        most = max(rows, key=rows.__getitem__)
        return _with_company(waiting, next(p for p, request in enumerate(waiting) if request.kind == most))

    return choose


def best_gain(replica: Replica) -> Choose:
    """The kind whose batch gets most done in a second: what its forwards take singly over what they take together."""

    def gain(waiting: list[Request], batch: Sequence[int]) -> float:
        requests = [waiting[position] for position in batch]
        singly_s = sum(replica.forward_s(request.kind, request.rows) for request in requests)
        return singly_s / replica.forward_s(requests[0].kind, sum(request.rows for request in requests))

    def choose(waiting: list[Request], _: float) -> list[int]:
        leads = {request.kind: position for position, request in reversed(list(enumerate(waiting)))}
        batches = [_with_company(waiting, position) for position in sorted(leads.values())]
        return max(batches, key=lambda batch: gain(waiting, batch))

    return choose


def _with_company(waiting: list[Request], lead: int) -> list[int]:
    chosen, rows = [lead], waiting[lead].rows
    for position, request in enumerate(waiting):
        if position != lead and request.kind == waiting[lead].kind and rows + request.rows <= MAX_ROWS:
            chosen.append(position)
            rows += request.rows
    return chosen


def darkroom(replica: Replica) -> Choose:
    """`policy/stepbatch`, as it is served."""

    def choose(waiting: list[Request], now_s: float) -> Sequence[int]:
        forwards = [
            WaitingForward(
                key=request.kind,
                rows=request.rows,
                deadline_s=request.deadline_s,
                waiting_since_s=request.waiting_since_s,
                arrived_s=request.arrived_s,
                steps_left=request.steps_left,
            )
            for request in waiting
        ]
        return choose_batch(forwards, now_s=now_s, max_rows=MAX_ROWS, cost=replica.costs.seconds).positions

    return choose


ORDERS: dict[str, Callable[[Replica], Choose]] = {
    "darkroom": darkroom,
    "oldest first": oldest_forward,
    "largest first": largest_group,
    "best gain": best_gain,
    "whole requests": request_level,
    "one by one": one_by_one,
}


def arrivals(
    curve: Callable[[int], float], load: float, count: int, rng: random.Random, *, deadline_share: float
) -> list[Request]:
    """Requests of a Poisson stream that keeps a replica without batching busy `load` of its time, or would."""
    drawn = [_draw(curve, rng) for _ in range(count)]
    gap_s = statistics.fmean(run_s for _, run_s in drawn) / load
    at_s = 0.0
    for request, run_s in drawn:
        at_s += rng.expovariate(1 / gap_s)
        request.arrived_s = request.waiting_since_s = at_s
        if rng.random() < deadline_share:
            request.deadline_s = at_s + run_s * rng.uniform(1.5, 6.0)
    return [request for request, _ in drawn]


def _draw(curve: Callable[[int], float], rng: random.Random) -> tuple[Request, float]:
    """A request, and its seconds by itself."""
    kind, rows, steps = rng.choice(list(_KINDS)), rng.choice((1, 2, 2, 2)), rng.randint(4, 50)
    request = Request(kind=kind, rows=rows, steps_left=steps, arrived_s=0.0, deadline_s=math.inf, waiting_since_s=0.0)
    return request, steps * _KINDS[kind] * curve(rows)


def figures_of(order: str, curve: Callable[[int], float], load: float, count: int, seeds: int) -> dict[str, float]:
    """What one order comes to, over several streams; `late_share` over others, where three in ten have a deadline."""
    runs = [_run(order, curve, load, count, seed, deadline_share=0.0) for seed in range(seeds)]
    bound_runs = [_run(order, curve, load, count, seed, deadline_share=0.3) for seed in range(seeds)]
    latencies = [request.latency_s for _, served in runs for request in served]
    bound = [request for _, served in bound_runs for request in served if request.deadline_s < math.inf]
    return {
        "requests_per_s": len(latencies) / sum(replica.now_s for replica, _ in runs),
        "mean_s": statistics.fmean(latencies),
        **{f"p{share}_s": quantile(latencies, share / 100) for share in (50, 95, 99)},
        "forwards_per_batch": sum(r.forward_count for r, _ in runs) / sum(r.batch_count for r, _ in runs),
        "late_share": sum(request.done_s > request.deadline_s for request in bound) / max(1, len(bound)),
    }


def _run(
    order: str, curve: Callable[[int], float], load: float, count: int, seed: int, *, deadline_share: float
) -> tuple[Replica, Sequence[Request]]:
    requests = arrivals(curve, load, count, random.Random(seed), deadline_share=deadline_share)
    replica = Replica(curve, random.Random(seed))
    replica.serve(requests, ORDERS[order](replica))
    return replica, requests


def measure(count: int, seeds: int) -> Iterator[dict[str, Any]]:
    """Figures of every order at every load, curve by curve, each with its table."""
    head = ["load, order", "req/s", "mean s", "p50", "p95", "p99", "batch", "late"]
    for name, curve in _CURVES.items():
        rows: list[list[str]] = []
        for load in LOADS:
            found = {order: figures_of(order, curve, load, count, seeds) for order in ORDERS}
            rows += [_row(f"{load} {order}", figures) for order, figures in found.items()]
            yield {"curve": name, "load": load, "orders": found}
        table(name, head, rows)


def _row(name: str, figures: dict[str, float]) -> list[str]:
    seconds = [f"{figures[f'{part}_s']:.2f}" for part in ("mean", "p50", "p95", "p99")]
    together, late = f"{figures['forwards_per_batch']:.2f}", f"{figures['late_share']:.1%}"
    return [name, f"{figures['requests_per_s']:.2f}", *seconds, together, late]


def main() -> None:
    """The bench."""
    parser = command_line("stepbatch_policy", "The order of forwards beside others, on a virtual clock.")
    parser.add_argument("--requests", type=int, help="of each stream; 400 unless told, 60 if quick")
    parser.add_argument("--streams", type=int, help="streams per figure; 4 unless told, 1 if quick")
    given = parser.parse_args()
    count, seeds = given.requests or (60 if given.quick else 400), given.streams or (1 if given.quick else 4)
    on = machine()
    found = list(measure(count, seeds))
    console.print(
        f"{count} requests in each of {seeds} streams. batch: forwards in one; late: of those with a deadline, "
        "in streams of their own."
    )
    finish("stepbatch_policy", on, {"request_count": count, "stream_count": seeds, "found": found})


if __name__ == "__main__":
    main()
