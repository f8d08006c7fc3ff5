"""Pictures of replays: latency, queue, hits by tier, bytes by link, replicas. Needs matplotlib."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from simulator.report import Figures, Series

Replays = Mapping[str, tuple[Figures, Series]]
_SIZE_IN, _DPI = (7, 4), 120


def write_plots(folder: Path, replays: Replays) -> list[Path]:
    """Writes one PNG file per figure, a line or a bar for each system. Raises ImportError without matplotlib."""
    import matplotlib as mpl  # noqa: PLC0415 - only who plots needs it

    mpl.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    pages: dict[str, Callable[[Any, Replays], None]] = {
        "latency": _latency,
        "queue": _queue,
        "hits": _hits,
        "bytes": _bytes,
        "replicas": _replicas,
    }
    return [_page(folder / f"{name}.png", draw, replays) for name, draw in pages.items()]


def _page(path: Path, draw: Callable[[Any, Replays], None], replays: Replays) -> Path:
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, axes = plt.subplots(figsize=_SIZE_IN, layout="constrained")
    draw(axes, replays)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=_DPI)
    plt.close(figure)
    return path


def _latency(axes: Any, replays: Replays) -> None:
    for name, (_, shown) in replays.items():
        count = len(shown.latencies_s)
        axes.plot(shown.latencies_s, [(place + 1) / count for place in range(count)], label=name)
    axes.set(xscale="log", xlabel="latency, s", ylabel="share of requests")


def _queue(axes: Any, replays: Replays) -> None:
    for name, (_, shown) in replays.items():
        axes.plot([time_s / 3600 for time_s in shown.times_s], shown.waiting, label=name, linewidth=1)
    axes.set(xlabel="hours", ylabel="requests that wait")


def _hits(axes: Any, replays: Replays) -> None:
    below = [0.0] * len(replays)
    for tier in ("device", "host", "disk", "remote"):
        shares = [getattr(figures, f"{tier}_hits") for figures, _ in replays.values()]
        axes.bar(list(replays), shares, bottom=below, label=tier)
        below = [a + b for a, b in zip(below, shares, strict=True)]
    axes.set(ylabel="share of requests, by where their base was")
    axes.tick_params(axis="x", rotation=30)


def _bytes(axes: Any, replays: Replays) -> None:
    for shift, (name, label) in enumerate((("network_gb", "network"), ("disk_gb", "disk"))):
        places = [place + 0.4 * shift for place in range(len(replays))]
        axes.bar(places, [getattr(figures, name) for figures, _ in replays.values()], width=0.4, label=label)
    axes.set_xticks(range(len(replays)), list(replays), rotation=30)
    axes.set(ylabel="GB", yscale="log")


def _replicas(axes: Any, replays: Replays) -> None:
    for name, (_, shown) in replays.items():
        for base, counts in list(shown.replicas.items())[:1]:
            axes.plot([time_s / 3600 for time_s in shown.times_s], counts, label=f"{name}: {base}", linewidth=1)
    axes.set(xlabel="hours", ylabel="workers that ran the most popular base")
