"""How fast a node's links are, from the loads that went over them. Pure: no clock, no I/O."""

from darkroom.policy.worth import LoadTimes, Tier

GUESSED = LoadTimes(network_s=1 / 100e6, disk_s=1 / 1e9, bus_s=1 / 4e9)
"""Until loads were seen: 100 MB/s, 1 GB/s and 4 GB/s."""
_GUESS_BYTES = 64e6
"""How many bytes' worth of loads a guess counts for: what tiny files take says nothing of large ones."""
_KEPT = 0.8
"""What is left of the weight of earlier loads after each."""


class Pace:
    """Mean seconds per byte by tier, the last loads counting most and each as much as it has bytes."""

    def __init__(self, guess: LoadTimes = GUESSED) -> None:
        """`guess`: for links that nothing went over yet."""
        of_tier = {Tier.DEVICE: guess.bus_s, Tier.HOST: guess.disk_s, Tier.DISK: guess.network_s}
        self._bytes = dict.fromkeys(of_tier, _GUESS_BYTES)
        self._seconds = {tier: _GUESS_BYTES * seconds for tier, seconds in of_tier.items()}

    def add(self, tier: Tier, size_bytes: float, seconds: float) -> None:
        """Notes a load to a tier from the next one."""
        self._bytes[tier] = _KEPT * self._bytes[tier] + size_bytes
        self._seconds[tier] = _KEPT * self._seconds[tier] + seconds

    @property
    def times(self) -> LoadTimes:
        """As of now."""
        network_s, disk_s, bus_s = (
            self._seconds[tier] / self._bytes[tier] for tier in (Tier.DISK, Tier.HOST, Tier.DEVICE)
        )
        return LoadTimes(network_s=network_s, disk_s=disk_s, bus_s=bus_s)
