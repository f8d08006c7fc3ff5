"""`darkroom simulate`: the services' own policies, the baselines and the limits on a virtual cluster."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from simulator.cluster import Hardware
from simulator.report import Figures, Series, Spread, summary, write_json
from simulator.run import PRODUCTION_COMPRESSION, REQUEST_COUNT, Settings, replays
from simulator.systems import ABLATIONS, ADDITIONS, BASELINES, LIMITS, OURS, SCALED, SERVED, SYSTEMS
from simulator.workload import SHAPES

_GROUPS = {
    "all": SYSTEMS,
    "baselines": BASELINES,
    "ours": OURS,
    "ablations": {**ABLATIONS, **ADDITIONS},
    "limits": LIMITS,
    "scaled": SCALED,
    "served": SERVED,
}
_SHOWN: Mapping[str, str] = {
    "mean_s": "mean, s",
    "p99_s": "p99, s",
    "queue": "waiting",
    "device_hits": "on device",
    "network_loads": "fetched",
    "network_gb": "network, GB",
    "disk_gb": "disk, GB",
    "load_s": "load, s",
    "duty": "duty",
    "scale_out_s": "scale-out, s",
}
_out = Console()


def simulate(  # noqa: PLR0917 - a command's options
    trace: Annotated[
        Path | None,
        typer.Option(help="GenTD26's requests: CSV, plain or gzipped. Default: made up after its statistics."),
    ] = None,
    policy: Annotated[
        list[str],
        typer.Option(help=f"Ways to serve: {', '.join(SYSTEMS)}; or {', '.join(_GROUPS)}. May be given again."),
    ] = ["lru", "darkroom", "all-warm"],  # noqa: B006 - typer copies it
    gpus: Annotated[int, typer.Option(min=1, max=10_000, help="Workers, one device each.")] = 24,
    seeds: Annotated[int, typer.Option(min=1, max=100, help="Runs of each, over which figures are averaged.")] = 1,
    compression: Annotated[
        float, typer.Option(min=0.001, max=10_000, help="How many times as fast requests come as in the trace.")
    ] = PRODUCTION_COMPRESSION,
    shape: Annotated[str, typer.Option(help=f"Arrivals in another shape: {', '.join(SHAPES)}.")] = "",
    requests: Annotated[int, typer.Option(min=1, help="Requests, of those made up.")] = REQUEST_COUNT,
    store_share: Annotated[
        float,
        typer.Option(min=0, help="Workers that the model store can send to at full speed at once; 0: any number."),
    ] = 0.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="File for every figure of every seed.")] = None,
    plots: Annotated[Path | None, typer.Option(help="Folder for plots; needs matplotlib.")] = None,
) -> None:
    """Replay a workload on a virtual cluster and compare ways to serve it."""
    names = _names(policy)
    if shape and shape not in SHAPES:
        raise typer.BadParameter(f"must be one of {', '.join(SHAPES)}", param_hint="--shape")
    settings = Settings(
        trace=trace,
        request_count=requests,
        compression=compression,
        shape=shape,
        hardware=replace(Hardware(), worker_count=gpus, store_share=store_share),
    )
    found: dict[str, list[Figures]] = {name: [] for name in names}
    shown: dict[str, tuple[Figures, Series]] = {}
    try:
        for name, seed, figures, series in replays(names, settings, range(seeds)):
            found[name].append(figures)
            shown.setdefault(name, (figures, series))
            _out.print(f"{name}, seed {seed}: mean {figures.mean_s:.1f} s, p99 {figures.p99_s:.1f} s", highlight=False)
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error), param_hint="--trace") from error
    _print_whole(_table(found))
    if json_file:
        write_json(json_file, asdict(settings) | {"trace": str(trace or ""), "seeds": seeds}, found)
    if plots:
        _plot(plots, shown)


def _names(policies: Sequence[str]) -> list[str]:
    names: dict[str, None] = {}
    for policy in policies:
        if policy not in SYSTEMS and policy not in _GROUPS:
            raise typer.BadParameter(f"{policy!r} is none of {', '.join((*SYSTEMS, *_GROUPS))}", param_hint="--policy")
        names |= dict.fromkeys(_GROUPS.get(policy, [policy]))
    return list(names)


def _table(found: Mapping[str, Sequence[Figures]]) -> Table:
    """Whichever are fewer, policies or figures, stand side by side."""
    figures = {name: summary(runs) for name, runs in found.items()}
    cells = [[_cell(own[key]) for key in _SHOWN] for own in figures.values()]
    rows, columns = list(found), list(_SHOWN.values())
    if len(rows) < len(columns):
        rows, columns, cells = columns, rows, [list(row) for row in zip(*cells, strict=True)]
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    for row, texts in zip(rows, cells, strict=True):
        table.add_row(row, *texts)
    return table


def _cell(figure: Spread) -> str:
    return f"{figure.mean:.4g}" + (f" ± {figure.half:.2g}" if figure.half else "")


def _print_whole(table: Table) -> None:
    """Prints a table as wide as it is: where the terminal is narrower, or there is none, rich would cut figures off."""
    needed = _out.measure(table, options=_out.options.update_width(10_000)).maximum
    Console(width=max(needed, _out.width)).print(table)


def _plot(folder: Path, shown: Mapping[str, tuple[Figures, Series]]) -> None:
    from simulator.plots import write_plots  # noqa: PLC0415 - matplotlib is an extra

    try:
        written = write_plots(folder, shown)
    except ImportError as error:
        raise typer.BadParameter("needs matplotlib: pip install 'darkroom[simulate]'", param_hint="--plots") from error
    _out.print(*(f"{path}" for path in written), sep="\n", highlight=False)
