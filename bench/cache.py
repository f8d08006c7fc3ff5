"""Ways to serve a trace on one virtual cluster: Darkroom, baselines, ablations, limits; latency, queue, bytes.

The trace is GenTD26's, the user's own copy; without one, requests made up after its published statistics. Production
load is the compression at which least-loaded routing over LRU has the trace's own mean latency, about 29 s. A seed
draws the models' sizes, ties, and the requests where they are made up.

    python -m bench.cache --trace gentd26_requests.csv.gz --seeds 5
"""

import argparse
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path

from bench import report
from simulator.report import Figures, Spread, summary
from simulator.run import PRODUCTION_COMPRESSION, Settings, replay, workload
from simulator.systems import SCALED, SYSTEMS

_LOADS = (1, 2, 4)
_PAPER = {"mean_s": "-49.8 %", "p99_s": "-12.8 %", "queue": "-82.9 %", "network_gb": "-89.5 %", "disk_gb": "-60.2 %"}
"""What SoCC'25 says of its whole against its production baseline."""
Shown = Mapping[str, tuple[str, float, int]]
"""By figure: its title, its unit, digits after the point."""
_SHOWN: Shown = {
    "mean_s": ("mean, s", 1, 2),
    "p99_s": ("p99, s", 1, 1),
    "queue": ("waiting", 1, 2),
    "network_loads": ("fetched", 1, 0),
    "network_gb": ("network, TB", 1000, 2),
    "disk_gb": ("disk, TB", 1000, 1),
    "load_s": ("load, s", 1, 1),
    "duty": ("duty, %", 0.01, 1),
    "hot_s": ("hot, s", 1, 1),
    "cold_s": ("cold, s", 1, 1),
}
_SHOWN_OF_SCALED: Shown = {
    "mean_s": ("mean, s", 1, 2),
    "p99_s": ("p99, s", 1, 1),
    "queue": ("waiting", 1, 2),
    "up_share": ("up, %", 0.01, 1),
    "duty": ("duty, %", 0.01, 1),
    "scale_outs": ("started", 1, 0),
    "scale_out_s": ("scale-out, s", 1, 1),
    "network_loads": ("fetched", 1, 0),
}
"""Of systems whose workers start and stop."""


def run_seed(settings: Settings, systems: Sequence[str], seed: int) -> dict[str, Figures]:
    """Every system over one seed's requests."""
    requests = workload(settings, seed)
    return {system: replay(system, requests, settings, seed)[0] for system in systems}


def main() -> None:
    """Prints a table per load."""
    options = _options()
    seeds, loads = (range(1), [1]) if options.quick else (range(options.seeds), options.loads)
    on = report.machine()
    results: dict[str, dict[str, list[Figures]]] = {}
    with ProcessPoolExecutor(options.processes) as pool:
        for load in loads:
            settings = Settings(
                trace=options.trace,
                request_count=600 if options.quick else Settings().request_count,
                compression=load * PRODUCTION_COMPRESSION,
            )
            found = list(pool.map(partial(run_seed, settings, options.systems), seeds))
            runs = {system: [one[system] for one in found] for system in options.systems}
            results[f"{load}"] = runs
            title = f"{load} x production load, {len(seeds)} seeds, {_trace_name(options.trace)}"
            _show(title, {name: of for name, of in runs.items() if name not in SCALED}, _SHOWN)
            _show(
                f"{title}; workers start and stop", {n: of for n, of in runs.items() if n in SCALED}, _SHOWN_OF_SCALED
            )
    figures = {load: {name: list(map(asdict, of)) for name, of in runs.items()} for load, runs in results.items()}
    report.finish("cache", on, figures)


def _show(title: str, runs: Mapping[str, Sequence[Figures]], shown: Shown) -> None:
    rows = [[system, *_cells(summary(of_system), shown)] for system, of_system in runs.items()]
    if rows:
        report.table(title, ("policy", *(name for name, _, _ in shown.values())), [*rows, *_claims(runs)])


def _cells(figures: Mapping[str, Spread], shown: Shown) -> list[str]:
    cells = []
    for key, (_, unit, digits) in shown.items():
        found = figures[key]
        interval = f" ± {found.half / unit:.{digits}f}" if found.half else ""
        cells.append(f"{found.mean / unit:.{digits}f}{interval}")
    return cells


def _claims(runs: Mapping[str, Sequence[Figures]]) -> list[list[str]]:
    """Darkroom against the production baseline, and the paper's own change."""
    if not {"lru", "darkroom"} <= runs.keys():
        return []
    ours, theirs = summary(runs["darkroom"]), summary(runs["lru"])
    changes = [f"{100 * (ours[key].mean / theirs[key].mean - 1):+.1f} %" if theirs[key].mean else "" for key in _SHOWN]
    return [["darkroom against lru", *changes], ["SoCC'25 against LRU", *(_PAPER.get(key, "") for key in _SHOWN)]]


def _trace_name(trace: Path | None) -> str:
    return trace.name if trace else "requests made up"


def _options() -> argparse.Namespace:
    parser = report.command_line("cache", "Ways to serve a trace, on a virtual cluster.")
    parser.add_argument("--trace", type=Path, help="GenTD26's requests, CSV, plain or gzipped")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=1, help="seeds at once")
    parser.add_argument("--loads", nargs="+", type=int, default=list(_LOADS), help="multiples of the production load")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    return parser.parse_args()


if __name__ == "__main__":
    main()
