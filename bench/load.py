"""How busy other processes kept the machine during a bench: figures from a busy machine are worth little."""

import time
from dataclasses import dataclass

import psutil

_QUIET_CORES = 0.1


@dataclass(frozen=True, slots=True)
class LoadReading:
    """CPU seconds so far: of the whole machine, and of this process with all it has started and not ended."""

    at_s: float
    busy_s: float
    own_s: float


def read_load() -> LoadReading:
    """The load now. What a process spent counts on once it has ended, if its parent lives and has waited for it."""
    times = psutil.cpu_times()
    busy_s = sum(times) - times.idle - times.iowait - times.guest - times.guest_nice  # guests are in user as well
    own = psutil.Process()
    return LoadReading(time.monotonic(), busy_s, sum(map(_spent_s, [own, *own.children(recursive=True)])))


def _spent_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system + times.children_user + times.children_system


def other_cores(before: LoadReading, after: LoadReading) -> float:
    """Cores that others kept busy, what a hypervisor took for other machines included."""
    others_s = (after.busy_s - before.busy_s) - (after.own_s - before.own_s)
    return max(0.0, others_s / (after.at_s - before.at_s))


def describe(cores: float) -> str:
    """A sentence for people."""
    verdict = "" if cores < _QUIET_CORES else ": too many to trust the figures"
    return f"Other processes kept {cores:.2f} cores busy{verdict}."
