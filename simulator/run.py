"""Runs systems over a workload, a seed after the other."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from simulator.cluster import Cluster, Hardware
from simulator.costs import Sizes
from simulator.generator import generate
from simulator.report import Figures, Series, measure, series
from simulator.systems import SYSTEMS
from simulator.workload import SHAPES, Request, compressed, read_gentd26, shaped

REQUEST_COUNT = 16_093
PRODUCTION_COMPRESSION = 4.0
"""At which the trace keeps the production baseline as busy as it was: mean latency about 29 s."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is simulated."""

    trace: Path | None = None
    """GenTD26's requests, CSV, or gzipped; None makes requests up after its statistics."""
    request_count: int = REQUEST_COUNT
    """Of those made up."""
    compression: float = PRODUCTION_COMPRESSION
    shape: str = ""
    """Of SHAPES; empty leaves arrivals as they are."""
    hardware: Hardware = field(default_factory=Hardware)


def workload(settings: Settings, seed: int) -> list[Request]:
    """The requests of one seed. Raises ValueError for a file that is no trace, OSError for none."""
    requests = read_gentd26(settings.trace) if settings.trace else generate(settings.request_count, seed=seed)
    if settings.shape:
        requests = shaped(requests, SHAPES[settings.shape], seed=seed)
    return compressed(requests, settings.compression)


def replay(system: str, requests: Sequence[Request], settings: Settings, seed: int) -> tuple[Figures, Series]:
    """One system over one seed's requests."""
    cluster = Cluster(SYSTEMS[system](requests), settings.hardware, Sizes(seed), seed=seed)
    jobs = cluster.replay(requests)
    return measure(cluster, jobs), series(jobs)


def replays(
    systems: Sequence[str], settings: Settings, seeds: Sequence[int]
) -> Iterator[tuple[str, int, Figures, Series]]:
    """Every system over every seed, as they come."""
    for seed in seeds:
        requests = workload(settings, seed)
        for system in systems:
            yield system, seed, *replay(system, requests, settings, seed)
