"""What a copy of a model is worth: the seconds that requests would lose without it. Pure: no clock, no I/O.

This project's own: SoCC'25 names the ingredients (reuse probability, load cost, kind, footprint) and no formula. A copy
is worth less the more others there are: one more helps only a request that finds the others busy, and how often that
is, Erlang's loss formula says. And once a request has brought a lost copy back nobody else loses anything: one load is
lost at most, with the probability that anybody misses the copy within a horizon.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass
from enum import IntEnum

from darkroom.policy.popularity import Popularity

_AGE_S = 5.0
_LEAVES_DEVICE = 0.3
"""Probability that what is on a device leaves it, and is asked for again, while its copy in host memory is kept."""


class Tier(IntEnum):
    """Where a model is, the nearest first."""

    DEVICE = 0
    HOST = 1
    DISK = 2
    REMOTE = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadTimes:
    """Seconds that a byte, or whatever sizes are counted in, takes from tier to tier on a node, alone on its links."""

    network_s: float
    """From the remote store."""
    disk_s: float
    """From the node's disk to host memory."""
    bus_s: float
    """From host memory to a network on the device."""

    def prepare_s(self, tier: Tier) -> float:
        """Per byte, until it is in host memory; bytes from afar are not read from disk again."""
        return (0.0, 0.0, self.disk_s, self.network_s)[tier]

    def saved_s(self, source: Tier, target: Tier) -> float:
        """Per byte, what a request need not wait for if a model has moved from one tier to another."""
        bus_s = self.bus_s if target is Tier.DEVICE else 0.0
        return self.prepare_s(source) - self.prepare_s(target) + bus_s

    def back_s(self, tier: Tier, kept: Collection[Tier]) -> float:
        """Per byte, what it costs to bring back to `tier` what left it, where the tiers `kept` still hold it."""
        if tier is Tier.DEVICE:
            return self.bus_s + (0.0 if Tier.HOST in kept else self.disk_s)
        if tier is Tier.HOST:
            return self.disk_s * (_LEAVES_DEVICE if Tier.DEVICE in kept else 1.0)
        return self.network_s


@dataclass(frozen=True, slots=True, kw_only=True)
class WorthConfig:
    """How far ahead copies are judged."""

    horizons_s: tuple[float, float, float] = (60.0, 200.0, 7200.0)
    """On device, host and disk. Short ones prefer what is asked for often, long ones what was asked for lately."""
    burst: float = 2.0
    """How many times its mean rate a model is asked for while it is asked for at all: requests come in bursts."""
    run_weight: float = 0.02
    """Of the newest request in a model's mean run time."""


def reuse_probability(rate: float, horizon_s: float) -> float:
    """That at least one request comes within the horizon, at `rate` requests a second without memory."""
    return -math.expm1(-rate * horizon_s)


def blocked_share(server_count: int, busy: float) -> float:
    """Erlang's B: the share of requests that find all of `server_count` busy; `busy`: servers they would keep busy."""
    blocked = 1.0
    for count in range(1, server_count + 1):
        blocked = busy * blocked / (count + busy * blocked)
    return blocked


class Worth:
    """Values of copies, from what was asked for so far."""

    def __init__(self, popularity: Popularity, times: LoadTimes, config: WorthConfig) -> None:
        self.popularity, self.times, self._config = popularity, times, config
        self._run_s: dict[str, float] = {}
        self._missed: dict[tuple[str, Tier, int], tuple[float, float]] = {}

    def add(self, name: str, now_s: float, run_s: float, count: int = 1) -> None:
        """Notes requests for a model, and how long each keeps a device busy."""
        self.popularity.add(name, now_s, count)
        before_s = self._run_s.get(name, run_s)
        weight = self._config.run_weight if count == 1 else 1 - (1 - self._config.run_weight) ** count
        self._run_s[name] = before_s + weight * (run_s - before_s)

    def run_s(self, name: str) -> float:
        """How long a request keeps a device busy, on average; 0 for a model that nobody asked for."""
        return self._run_s.get(name, 0.0)

    def restore(self, name: str, run_s: float) -> None:
        """Takes over what `run_s` gave, for a model that nothing is known about yet."""
        self._run_s.setdefault(name, run_s)

    def missed_share(self, name: str, tier: Tier, others: int, now_s: float) -> float:
        """Probability that a request misses one copy soon, with `others` like it. Some seconds old at most.

        One more copy on a device helps only while the others are busy, and that is a matter of minutes: there what was
        asked for hours ago does not count.
        """
        key = (name, tier, others)
        known = self._missed.get(key)
        if known is None or now_s - known[0] > _AGE_S:
            is_further = others > 0 and tier is Tier.DEVICE
            rate = (self.popularity.recent_rate if is_further else self.popularity.rate)(name, now_s)
            share = self.missed_share_at(rate, self.run_s(name), tier, others)
            known = self._missed[key] = (now_s, share)
        return known[1]

    def missed_share_at(self, rate: float, run_s: float, tier: Tier, others: int) -> float:
        """The same of a model that is asked for so often, by requests of so many seconds."""
        rate *= self._config.burst
        busy = rate * run_s
        blocked = blocked_share(others, busy)
        missed = blocked - busy * blocked / (others + 1 + busy * blocked)  # Erlang's B of one server more
        return reuse_probability(rate * missed, self._config.horizons_s[tier])
