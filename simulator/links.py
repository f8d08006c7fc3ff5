"""Transfers that share bandwidth: each gets the smallest of its links' equal shares."""

from collections.abc import Sequence

from simulator.clock import Action, Clock, Event

_LEAST_BYTES = 1e-6


class Link:
    """A network card, a disk, a bus: so many bytes a second for all that use it together."""

    __slots__ = ("bytes_per_s", "moved_bytes", "name", "transfers")

    def __init__(self, name: str, bytes_per_s: float) -> None:
        self.name, self.bytes_per_s = name, bytes_per_s
        self.transfers: dict[Transfer, None] = {}
        self.moved_bytes = 0.0

    @property
    def share(self) -> float:
        """Bytes per second of each transfer."""
        return self.bytes_per_s / len(self.transfers)


class Transfer:
    """Bytes on their way."""

    __slots__ = ("_clock", "_done", "_event", "_left_bytes", "_links", "_rate", "_since_s")

    def __init__(self, clock: Clock, links: Sequence[Link], size_bytes: float, done: Action) -> None:
        """Starts at once and calls `done` when all bytes are there."""
        self._clock, self._links, self._done = clock, links, done
        self._left_bytes, self._rate, self._since_s = size_bytes, 0.0, clock.now_s
        self._event: Event | None = None
        for link in links:
            link.transfers[self] = None
            link.moved_bytes += size_bytes
        self._share_anew()

    def _share_anew(self) -> None:
        """Every transfer that shares a link with this one goes on at its new rate."""
        for transfer in {other: None for link in self._links for other in link.transfers}:
            transfer._go_on()

    def _go_on(self) -> None:
        now_s = self._clock.now_s
        rate = min(link.share for link in self._links)
        if rate == self._rate and self._event:
            return
        self._left_bytes -= self._rate * (now_s - self._since_s)
        self._rate, self._since_s = rate, now_s
        if self._event:
            self._event.cancel()
        self._event = self._clock.after(max(self._left_bytes, _LEAST_BYTES) / rate, self._end)

    def _end(self) -> None:
        for link in self._links:
            del link.transfers[self]
        self._share_anew()
        self._done()
