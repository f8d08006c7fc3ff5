"""What the processes of a cluster cost: CPU seconds and resident bytes, by the child's name."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import psutil

from darkroom.runtime.cluster import LocalCluster

CLIENT = "client"
"""The bench's own process, which holds the client."""


@dataclass(frozen=True, slots=True)
class CpuReading:
    """CPU seconds of every process so far, at a time."""

    at_s: float
    seconds: Mapping[str, float]

    def until(self, later: "CpuReading") -> dict[str, float]:
        """CPU seconds of each process between two readings."""
        return {name: later.seconds[name] - spent_s for name, spent_s in self.seconds.items()}

    def share_until(self, later: "CpuReading") -> float:
        """Cores that all processes together kept busy between two readings."""
        return sum(self.until(later).values()) / (later.at_s - self.at_s)


def _processes(cluster: LocalCluster) -> dict[str, psutil.Process]:
    found = {child.name: psutil.Process(child.pid) for child in cluster.children if child.pid}
    return {**found, CLIENT: psutil.Process()}


def read_cpu(cluster: LocalCluster) -> CpuReading:
    """CPU seconds of the cluster's processes and of this one."""
    seconds = {}
    for name, process in _processes(cluster).items():
        times = process.cpu_times()
        seconds[name] = times.user + times.system
    return CpuReading(time.monotonic(), seconds)


def read_resident_bytes(cluster: LocalCluster) -> dict[str, int]:
    """Resident set of each process of the cluster; pages shared by several count for each."""
    return {name: process.memory_info().rss for name, process in _processes(cluster).items() if name != CLIENT}
