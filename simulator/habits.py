"""The bandit at work: at each slot of the day it brings models to host memory, and hears at its end what that saved."""

from dataclasses import dataclass

from darkroom.policy.popularity import Band
from darkroom.policy.prefetch import BanditConfig, HourBandit
from darkroom.policy.worth import Worth
from simulator.cluster import Cluster
from simulator.worker import DISK, HOST, Worker

_PLAYS = 8  # of a slot, at most


@dataclass(slots=True)
class _Play:
    worker_id: int
    size: float
    saved_s: float = 0.0


class Habits:
    """Prefetches by the hour, on a cluster."""

    def __init__(self, config: BanditConfig, cluster: Cluster, worth: Worth) -> None:
        self._bandit, self._cluster, self._worth = HourBandit(config), cluster, worth
        self._plays: dict[str, _Play] = {}

    def used(self, name: str, worker: Worker) -> None:
        """A request was sent to a worker: the first after a play tells what it saved."""
        play = self._plays.get(name)
        if play and play.worker_id == worker.worker_id and worker.tier_of(name) <= HOST and not play.saved_s:
            play.saved_s = play.size * self._worth.times.disk_s

    def next_slot(self) -> None:
        """Settles the slot that is over, and plays the one that begins."""
        now_s, bandit = self._cluster.clock.now_s, self._bandit
        before = bandit.slot(now_s - bandit.config.slot_s)
        for name, play in self._plays.items():
            bandit.reward(name, before, play.saved_s, play.size * self._worth.times.disk_s)
        self._plays = {}
        bands = self._worth.popularity.bands(now_s)
        warm = [name for name, band in bands.items() if band is Band.WARM and self._holders(name)]
        for name in bandit.choose(warm, bandit.slot(now_s), _PLAYS):
            holders = self._holders(name)  # an earlier play may have taken the last
            if not holders:
                continue
            holder = min(holders, key=lambda worker: (len(worker.jobs), worker.worker_id))
            self._plays[name] = _Play(holder.worker_id, self._cluster.sizes.base(name))
            holder.prefetch(name, HOST)

    def _holders(self, name: str) -> list[Worker]:
        """Workers that have it on disk and no nearer, and are not loading."""
        return [w for w in self._cluster.workers if w.tier_of(name) == DISK and not w.is_loading_anything]
