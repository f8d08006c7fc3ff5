"""What bench.stepbatch says of its runs: figures by load and side, the share of the bound, where time goes."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from bench.report import console, quantile, table
from bench.stepbatch_mix import SIDES_PX, Curve, Wanted, curve_s, least_s
from bench.worker import Answer

BACKLOG = 0.0
"""The load at which all requests are there from the start."""
OURS, PLAIN = "darkroom", "plain"
WHOLE = ("requests, strict", "requests")
AIM_BOUND_SHARE, AIM_OVERHEAD_S, AIM_P99_RATIO = 0.9, 0.0015, 0.6
_QUANTILES = (50, 95, 99)
_PX_PER_LATENT = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One stream served by one side."""

    side: str
    round: int
    load: float
    requests: Sequence[Wanted]
    whole_s: float
    cpu_s: float
    loop_cpu_s: float
    """Of it, the event loop's beside the engine; plain diffusers has but one thread."""
    network_cpu_s: float
    latency_s: Sequence[float]
    forwards: Sequence[tuple[int, int, int, float]]
    """Latent side, rows, count and seconds of the UNet's forwards."""
    other_cores: float

    @classmethod
    def of(
        cls, side: str, number: int, load: float, requests: Sequence[Wanted], answer: Answer, *, other_cores: float
    ) -> Self:
        """From a side's answer."""
        told = {
            name: answer[name] for name in ("whole_s", "cpu_s", "loop_cpu_s", "network_cpu_s", "latency_s", "forwards")
        }
        return cls(side=side, round=number, load=load, requests=requests, other_cores=other_cores, **told)

    @property
    def network_s(self) -> float:
        """Seconds inside UNets."""
        return sum(seconds for *_, seconds in self.forwards)

    @property
    def batch_count(self) -> int:
        """Forwards of UNets."""
        return sum(count for _, _, count, _ in self.forwards)

    @property
    def step_count(self) -> int:
        """Steps of all requests."""
        return sum(wanted.step_count for wanted in self.requests)

    def curve_s(self, curves: Mapping[int, Curve]) -> float:
        """What the cost curve says of the batches that were run."""
        return sum(count * curve_s(curves[side * _PX_PER_LATENT], rows) for side, rows, count, _ in self.forwards)


def summarise(runs: Sequence[Run], curves: Mapping[int, Curve], errors: Mapping[str, float]) -> dict[str, Any]:
    """The figures, as they go to the file."""
    loads = sorted({run.load for run in runs if run.load != BACKLOG})
    by_load = {f"{load:g}": _by_side([run for run in runs if run.load == load]) for load in loads}
    backlog = [run for run in runs if run.load == BACKLOG]
    bound_s = {run.round: least_s(run.requests, curves) for run in backlog}
    at_once = _by_side(backlog)
    for side, found in at_once.items():
        of_side = [run for run in backlog if run.side == side]
        found |= _account(of_side, sum(bound_s[run.round] for run in of_side), curves)  # noqa: PLW2901
        found["latent_error"] = errors[side]
    return {
        "unet_forward_s": curves,
        "bound_requests_per_s": sum(len(r.requests) for r in backlog if r.side == OURS) / sum(bound_s.values()),
        "all_at_once": at_once,
        "loads": by_load,
        "runs": [
            {"side": r.side, "round": r.round, "load": r.load, "whole_s": r.whole_s, "other_cores": r.other_cores}
            for r in runs
        ],
    }


def _by_side(runs: Sequence[Run]) -> dict[str, dict[str, float]]:
    sides = dict.fromkeys(run.side for run in sorted(runs, key=lambda run: run.round))
    return {side: _figures([run for run in runs if run.side == side]) for side in sides}


def _figures(runs: Sequence[Run]) -> dict[str, float]:
    latencies = [latency_s for run in runs for latency_s in run.latency_s]
    return {
        "request_count": len(latencies),
        "requests_per_s": len(latencies) / sum(run.whole_s for run in runs),
        "mean_s": statistics.fmean(latencies),
        **{f"p{share}_s": quantile(latencies, share / 100) for share in _QUANTILES},
        "requests_per_batch": sum(run.step_count for run in runs) / sum(run.batch_count for run in runs),
        "other_cores": statistics.fmean(run.other_cores for run in runs),
    }


def _account(runs: Sequence[Run], bound_s: float, curves: Mapping[int, Curve]) -> dict[str, float]:
    """Where the seconds of a side went that had work all the time; what follows `bound_s` adds up to `whole_s`."""
    whole_s, network_s = sum(run.whole_s for run in runs), sum(run.network_s for run in runs)
    on_curve_s, steps = sum(run.curve_s(curves) for run in runs), sum(run.step_count for run in runs)
    return {
        "whole_s": whole_s,
        "step_count": steps,
        "bound_s": bound_s,
        "bound_share": bound_s / whole_s,
        "smaller_batches_s": on_curve_s - bound_s,
        "beyond_curve_s": network_s - on_curve_s,
        "outside_networks_s": whole_s - network_s,
        "outside_networks_per_step_s": (whole_s - network_s) / steps,
        "loop_cpu_s": sum(run.loop_cpu_s for run in runs),
        "outside_networks_cpu_s": sum(run.cpu_s - run.loop_cpu_s - run.network_cpu_s for run in runs),
    }


def show(figures: Mapping[str, Any]) -> None:
    """The tables and the verdicts."""
    curves = figures["unet_forward_s"]
    rows = [
        [
            str(n),
            *(f"{1000 * curves[px][n]:.1f}" for px in SIDES_PX),
            *(f"{1000 * curves[px][n] / n:.2f}" for px in SIDES_PX),
        ]
        for n in curves[SIDES_PX[0]]
    ]
    names = [f"{px} px" for px in SIDES_PX]
    table("The UNet's cost, ms", ["rows", *names, *(f"{name}, per row" for name in names)], rows)
    _show_backlog(figures)
    head = ["load, side", "requests/s", "mean s", *(f"p{share}" for share in _QUANTILES), "per batch", "others"]
    for load, sides in figures["loads"].items():
        table(f"{load} of plain diffusers' capacity", head, [_row(*item) for item in sides.items()])
    for line in verdicts(figures):
        console.print(line)


def _row(side: str, figures: Mapping[str, float]) -> list[str]:
    seconds = [f"{figures[name]:.2f}" for name in ("mean_s", *(f"p{share}_s" for share in _QUANTILES))]
    together, others = f"{figures['requests_per_batch']:.2f}", f"{figures['other_cores']:.2f}"
    return [side, f"{figures['requests_per_s']:.2f}", *seconds, together, others]


def _show_backlog(figures: Mapping[str, Any]) -> None:
    at_once = figures["all_at_once"]
    head = ["side", "requests/s", "× plain", "of the bound", "per batch", "mean s", "error", "others"]
    plain = at_once[PLAIN]["requests_per_s"]
    rows = [
        [
            side,
            f"{one['requests_per_s']:.2f}",
            f"{one['requests_per_s'] / plain:.2f}",
            f"{one['bound_share']:.0%}",
            f"{one['requests_per_batch']:.2f}",
            f"{one['mean_s']:.2f}",
            f"{one['latent_error']:.0e}",
            f"{one['other_cores']:.2f}",
        ]
        for side, one in at_once.items()
    ]
    count = at_once[OURS]["request_count"]
    table(f"All at once: {count} requests, {at_once[OURS]['step_count']} steps", head, rows)
    parts = (
        "bound_s",
        "smaller_batches_s",
        "beyond_curve_s",
        "outside_networks_s",
        "whole_s",
        "outside_networks_cpu_s",
        "loop_cpu_s",
    )
    head = [
        "ms a request-step",
        "bound",
        "smaller batches",
        "beyond the curve",
        "outside networks",
        "in all",
        "outside, CPU",
        "loop, CPU",
    ]
    table("Where the time goes, all at once", head, [_per_step(side, one, parts) for side, one in at_once.items()])


def _per_step(side: str, figures: Mapping[str, float], parts: Iterable[str]) -> list[str]:
    return [side, *(f"{1000 * figures[part] / figures['step_count']:.2f}" for part in parts)]


def verdicts(figures: Mapping[str, Any]) -> list[str]:
    """The aims, one sentence each."""
    ours = figures["all_at_once"][OURS]
    outside_s, outside_cpu_s = ours["outside_networks_per_step_s"], ours["outside_networks_cpu_s"] / ours["step_count"]
    said = [f"{ours['bound_share']:.0%} of the bound with all at once, aim {AIM_BOUND_SHARE:.0%}."]
    outside = f"{1000 * outside_s:.2f} ms a request-step outside networks, {1000 * outside_cpu_s:.2f} of CPU"
    said.append(f"{outside}; aim {1000 * AIM_OVERHEAD_S:g}.")
    said += [_verdict(load, sides) for load, sides in figures["loads"].items()]
    return [*said, f"Aim at load 0.8: p99 at most {AIM_P99_RATIO} of whole requests'."]


def _verdict(load: str, sides: Mapping[str, Mapping[str, float]]) -> str:
    others = [side for side in (PLAIN, *WHOLE) if side in sides]
    ratios = {name: [sides[OURS][name] / sides[side][name] for side in others] for name in ("mean_s", "p99_s")}
    listed = "; ".join(
        f"{name.removesuffix('_s')} {', '.join(f'{r:.2f} of {s}' for r, s in zip(found, others, strict=True))}"
        for name, found in ratios.items()
    )
    lost = [name.removesuffix("_s") for name, found in ratios.items() if max(found) > 1.0]
    return f"Load {load}: {'behind in ' + ' and '.join(lost) if lost else 'ahead of all'}. {listed}."


def profile_table(answer: Answer, steps: int) -> dict[str, Any]:
    """Seconds by part, and the table of milliseconds per request-step."""
    booked: dict[str, Sequence[float]] = answer["booked"]
    whole_s, network_s = answer["whole_s"], sum(seconds for *_, seconds in answer["forwards"])
    ordered = sorted(booked.items(), key=lambda item: -item[1][0])
    rows = [[name, f"{1000 * s / steps:.3f}", f"{n / steps:.2f}", f"{1e6 * s / n:.0f}"] for name, (s, n) in ordered]
    rest_s = whole_s - sum(seconds for seconds, _ in booked.values())
    rows.append(["not booked", f"{1000 * rest_s / steps:.3f}", "", ""])
    table(f"The engine's time, {steps} request-steps", ["part", "ms a step", "calls a step", "µs a call"], rows)
    outside_s = whole_s - network_s
    console.print(f"Outside networks: {1000 * outside_s / steps:.2f} ms a step, the cost of booking included.")
    console.print(f"Beside it, the event loop's CPU: {1000 * answer['loop_cpu_s'] / steps:.2f} ms a step.")
    return {"step_count": steps, "whole_s": whole_s, "network_s": network_s, "parts": booked}
