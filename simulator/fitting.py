"""Seconds by tier, read off the load times that GenTD26 publishes beside its requests: a check on those in `costs`.

The trace says how long loads took and not from where: they fall into modes, the nearest tier's first, told apart by
k-means over the logarithms.

    python -m simulator.fitting basemodel_update_latency_anon.tar.gz
"""

import argparse
import csv
import gzip
import io
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from rich.console import Console
from scipy.cluster.vq import ClusterError, kmeans2

_TIERS = ("host", "disk", "remote")
_COLUMN = "value"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mode:
    """Loads from one tier."""

    share: float
    """Of all loads."""
    median_s: float
    spread: float
    """Standard deviation of the logarithm: of sizes, and of how busy links are."""


def read_load_times(path: Path) -> list[float]:
    """Seconds of each load in one of the trace's files: CSV, plain, gzipped, or as it is published, in a tar archive.

    Raises ValueError for a file of another form, OSError for none.
    """
    times_s: list[float] = []
    with path.open("rb") as file:
        for text in _texts(path, file):
            rows = csv.DictReader(text)
            if _COLUMN not in (rows.fieldnames or ()):
                raise ValueError(f"{path}: no load times of GenTD26: it has no column {_COLUMN!r}")
            times_s += [float(row[_COLUMN]) / 1000 for row in rows]
    return times_s


def _texts(path: Path, file: IO[bytes]) -> Iterator[IO[str]]:
    if path.name.endswith((".tar.gz", ".tgz", ".tar")):
        with tarfile.open(fileobj=file) as archive:
            for member in archive:
                content = archive.extractfile(member)
                if content and member.name.endswith(".csv"):
                    yield io.TextIOWrapper(content, newline="")
    elif path.suffix == ".gz":
        with gzip.open(file, "rt", newline="") as text:
            yield text
    else:
        yield io.TextIOWrapper(file, newline="")


def fit_modes(times_s: Sequence[float], count: int = len(_TIERS)) -> list[Mode]:
    """The modes, the fastest first. Raises ValueError for positive times that fall into fewer."""
    logs = np.sort(np.log([time_s for time_s in times_s if time_s > 0]))
    try:
        begin = np.quantile(logs, [(place + 0.5) / count for place in range(count)])
        _, modes = kmeans2(logs, begin, minit="matrix", missing="raise")
    except (ClusterError, IndexError) as error:
        raise ValueError(f"{len(logs)} load times are too few, or too equal, for {count} modes") from error
    parts = [logs[modes == mode] for mode in range(count)]
    return [
        Mode(share=len(part) / len(logs), median_s=float(np.exp(np.median(part))), spread=float(np.std(part)))
        for part in sorted(parts, key=lambda part: float(part[0]))
    ]


def main() -> None:
    """Prints what a file comes to."""
    parser = argparse.ArgumentParser(prog="python -m simulator.fitting", description="Modes of load times.")
    parser.add_argument("file", type=Path, help="one of GenTD26's *_latency files")
    options = parser.parse_args()
    times_s, out = read_load_times(options.file), Console(highlight=False)
    out.print(f"{len(times_s)} loads, mean {np.mean(times_s):.1f} s")
    for tier, mode in zip(_TIERS, fit_modes(times_s), strict=True):
        out.print(f"{tier:7}{mode.share:6.1%} at {mode.median_s:5.1f} s, spread of the logarithm {mode.spread:.2f}")


if __name__ == "__main__":
    main()
