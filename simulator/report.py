"""Figures of a replay: latency, queue, hits, bytes, duty, and the series that plots show."""

import bisect
import itertools
import json
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from simulator.cluster import Cluster
from simulator.costs import gigabytes
from simulator.worker import DEVICE, DISK, HOST, REMOTE, Job

_HOT_SHARE, _COLD_SHARE = 0.05, 0.70
_BIN_COUNT = 200
_SHOWN_COUNT = 3
_T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}
"""Student's t by the number of values: half a 95 % interval in standard errors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What one replay came to."""

    request_count: int
    mean_s: float
    """Latency: from arrival to answer."""
    p50_s: float
    p95_s: float
    p99_s: float
    wait_s: float
    """Mean time from arrival to the first step."""
    queue: float
    """Mean number of requests that wait."""
    device_hits: float
    """Share of requests whose base was on the worker's device when they came to it; likewise for the others."""
    host_hits: float
    disk_hits: float
    remote_hits: float
    network_loads: int
    """Base models fetched from the remote store."""
    network_gb: float
    disk_gb: float
    """Read from the nodes' disks, and written to them."""
    load_s: float
    """Mean time that a base took to come to a device: what a new replica takes to be warm."""
    duty: float
    """Share of the devices' time, while they are up, spent on requests' steps, decoding and encoding."""
    up_share: float
    """Share of the workers that are up, on average."""
    scale_outs: int
    """Workers that were started and loaded a model."""
    scale_out_s: float
    """Mean time from the decision to start one until its first model was on the device; 0 where none was started."""
    hot_s: float
    """Mean latency of requests for the most popular 5 % of base models."""
    cold_s: float
    """Likewise for the least popular 70 %."""


def measure(cluster: Cluster, jobs: Sequence[Job]) -> Figures:
    """The figures of a replay that is over."""
    count, span_s = len(jobs), max(job.finish_s for job in jobs)
    latencies = sorted(job.finish_s - job.request.arrival_s for job in jobs)
    waits = [job.start_s - job.request.arrival_s for job in jobs]
    hits = Counter(job.tier for job in jobs)
    network = sum(worker.network.moved for worker in cluster.workers if worker.network)
    disk = sum(worker.disk.moved for worker in cluster.workers if worker.disk)
    loads = [seconds for worker in cluster.workers for seconds in worker.load_seconds]
    hot, cold = _bands(jobs)
    delays_s = cluster.fleet.delays_s if cluster.fleet else []
    up_s = cluster.fleet.up_s if cluster.fleet else span_s * len(cluster.workers)
    return Figures(
        request_count=count,
        mean_s=statistics.fmean(latencies),
        p50_s=latencies[count // 2],
        p95_s=latencies[int(0.95 * count)],
        p99_s=latencies[int(0.99 * count)],
        wait_s=statistics.fmean(waits),
        queue=sum(waits) / span_s,
        device_hits=hits[DEVICE] / count,
        host_hits=hits[HOST] / count,
        disk_hits=hits[DISK] / count,
        remote_hits=hits[REMOTE] / count,
        network_loads=sum(worker.load_counts[REMOTE] for worker in cluster.workers),
        network_gb=gigabytes(network),
        disk_gb=gigabytes(disk + network),
        load_s=statistics.fmean(loads) if loads else 0.0,
        duty=sum(worker.device.busy_s for worker in cluster.workers) / up_s,
        up_share=up_s / (span_s * len(cluster.workers)),
        scale_outs=len(delays_s),
        scale_out_s=_mean(delays_s),
        hot_s=_mean([job.finish_s - job.request.arrival_s for job in jobs if job.request.base in hot]),
        cold_s=_mean([job.finish_s - job.request.arrival_s for job in jobs if job.request.base in cold]),
    )


def _bands(jobs: Sequence[Job]) -> tuple[set[str], set[str]]:
    ranked = [name for name, _ in Counter(job.request.base for job in jobs).most_common()]
    hot, cold = math.ceil(_HOT_SHARE * len(ranked)), math.ceil((1 - _COLD_SHARE) * len(ranked))
    return set(ranked[:hot]), set(ranked[cold:])


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else 0.0


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure over several seeds: the mean, and half of its 95 % interval."""

    mean: float
    half: float


def spread(values: Sequence[float]) -> Spread:
    """Of one figure over seeds; a single one has no interval."""
    if len(values) == 1:
        return Spread(values[0], 0.0)
    t = _T_95.get(len(values), 1.96)
    return Spread(statistics.fmean(values), t * statistics.stdev(values) / math.sqrt(len(values)))


def summary(runs: Sequence[Figures]) -> dict[str, Spread]:
    """Every figure over the seeds."""
    rows = [asdict(run) for run in runs]
    return {name: spread([float(row[name]) for row in rows]) for name in rows[0]}


@dataclass(frozen=True, slots=True)
class Series:
    """What plots show of a replay."""

    latencies_s: list[float]
    """Sorted."""
    times_s: list[float]
    waiting: list[int]
    """Requests that wait at each of the times."""
    replicas: dict[str, list[int]]
    """For the most popular base models: workers that began a request for it since the time before."""


def series(jobs: Sequence[Job]) -> Series:
    """The series of a replay."""
    end_s = max(job.finish_s for job in jobs)
    times_s = [end_s * place / _BIN_COUNT for place in range(1, _BIN_COUNT + 1)]
    changes = sorted([(job.request.arrival_s, 1) for job in jobs] + [(job.start_s, -1) for job in jobs])
    counts = list(itertools.accumulate(change for _, change in changes))
    moments = [moment for moment, _ in changes]
    waiting = [counts[bisect.bisect_right(moments, time_s) - 1] for time_s in times_s]
    popular = [name for name, _ in Counter(job.request.base for job in jobs).most_common(_SHOWN_COUNT)]
    ran: dict[str, list[set[int]]] = {name: [set() for _ in times_s] for name in popular}
    for job in jobs:
        if job.request.base in ran:
            place = min(int(job.start_s / end_s * _BIN_COUNT), _BIN_COUNT - 1)
            ran[job.request.base][place].add(job.worker_id)
    return Series(
        latencies_s=sorted(job.finish_s - job.request.arrival_s for job in jobs),
        times_s=times_s,
        waiting=waiting,
        replicas={name: [len(workers) for workers in bins] for name, bins in ran.items()},
    )


def write_json(path: Path, settings: Mapping[str, object], results: Mapping[str, Sequence[Figures]]) -> None:
    """Every figure of every seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    systems = {name: [asdict(run) for run in runs] for name, runs in results.items()}
    path.write_text(json.dumps({"settings": settings, "systems": systems}, indent=1) + "\n")
