"""Habits on simulated workers: they bring models from disk to host memory."""

from darkroom.policy.habits import Habits, Memory, Offer
from darkroom.policy.popularity import Band
from darkroom.policy.prefetch import BanditConfig
from darkroom.policy.worth import Tier, Worth
from simulator.cluster import Cluster
from simulator.worker import DISK, HOST, Worker


class Hours:
    """Prefetches by the hour, on a cluster."""

    def __init__(self, config: BanditConfig, cluster: Cluster, worth: Worth) -> None:
        self._habits, self._cluster, self._worth = Habits(config, Memory(slot_number=0)), cluster, worth

    def used(self, name: str, worker: Worker) -> None:
        """A request was sent to a worker."""
        if worker.tier_of(name) <= HOST:
            self._habits.used(name, _node_id(worker))

    def next_slot(self) -> None:
        """Settles the slot that is over, and plays the one that begins."""
        now_s = self._cluster.clock.now_s
        bands = self._worth.popularity.bands(now_s)
        offers = [self._offer(name) for name, band in bands.items() if band is Band.WARM]
        for play in self._habits.next_slot([offer for offer in offers if offer.node_ids], now_s):
            self._cluster.workers[int(play.node_id)].prefetch(play.name, HOST)
            self._habits.arrived(play.name, now_s)  # as good as: the price of bytes on their way is paid

    def _offer(self, name: str) -> Offer:
        """To workers that have it on disk and no nearer, and are not loading, the least busy first."""
        workers = [w for w in self._cluster.workers if w.tier_of(name) == DISK and not w.is_loading_anything]
        workers.sort(key=lambda worker: (len(worker.jobs), worker.worker_id))
        read_s = self._cluster.sizes.base(name) * self._worth.times.disk_s
        node_ids = [_node_id(worker) for worker in workers]
        return Offer(name=name, tier=Tier.HOST, node_ids=node_ids, saved_s=read_s, moved_s=read_s)


def _node_id(worker: Worker) -> str:
    return f"{worker.worker_id:03}"
