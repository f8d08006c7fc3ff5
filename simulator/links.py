"""Transfers that share bandwidth: each gets the smallest of its links' equal shares."""

from collections.abc import Sequence

from simulator.clock import Action, Clock, Event

_LEAST = 1e-6


class Link:
    """A network card, a disk, a bus: so much a second, in median bases, for all that use it together."""

    __slots__ = ("moved", "name", "rate", "transfers")

    def __init__(self, name: str, rate: float) -> None:
        self.name, self.rate = name, rate
        self.transfers: dict[Transfer, None] = {}
        self.moved = 0.0

    @property
    def share(self) -> float:
        """Per second, of each transfer."""
        return self.rate / len(self.transfers)


class Transfer:
    """Something on its way."""

    __slots__ = ("_clock", "_done", "_event", "_left", "_links", "_rate", "_since_s")

    def __init__(self, clock: Clock, links: Sequence[Link], size: float, done: Action) -> None:
        """Starts at once and calls `done` when all of it is there."""
        self._clock, self._links, self._done = clock, links, done
        self._left, self._rate, self._since_s = size, 0.0, clock.now_s
        self._event: Event | None = None
        for link in links:
            link.transfers[self] = None
            link.moved += size
        self._share_anew()

    def _share_anew(self) -> None:
        """Every transfer that shares a link with this one goes on at its new rate."""
        for transfer in {other: None for link in self._links for other in link.transfers}:
            transfer.go_on()

    def go_on(self) -> None:
        """At the rate that its links now have for it."""
        now_s = self._clock.now_s
        rate = min(link.share for link in self._links)
        if rate == self._rate and self._event:
            return
        self._left -= self._rate * (now_s - self._since_s)
        self._rate, self._since_s = rate, now_s
        if self._event:
            self._event.cancel()
        self._event = self._clock.after(max(self._left, _LEAST) / rate, self._end)

    def _end(self) -> None:
        for link in self._links:
            del link.transfers[self]
        self._share_anew()
        self._done()
