"""What happens when, in virtual seconds. Pure: the same events give the same order."""

import heapq
import itertools
from collections.abc import Callable

Action = Callable[[], None]


class Event:
    """Something that is to happen, unless it is cancelled."""

    __slots__ = ("action",)

    def __init__(self, action: Action) -> None:
        self.action: Action | None = action

    def cancel(self) -> None:
        """It does not happen; no harm if it already did."""
        self.action = None


class Clock:
    """Runs actions in the order of their times, those of one time in the order they were asked for."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._order = itertools.count()
        self._events: list[tuple[float, int, Event]] = []

    def at(self, time_s: float, action: Action) -> Event:
        """Calls `action` at that time, or now if that is past."""
        event = Event(action)
        heapq.heappush(self._events, (max(time_s, self.now_s), next(self._order), event))
        return event

    def after(self, delay_s: float, action: Action) -> Event:
        """Calls `action` that much later."""
        return self.at(self.now_s + delay_s, action)

    def run(self) -> None:
        """Until nothing is left to happen."""
        while self._events:
            time_s, _, event = heapq.heappop(self._events)
            if event.action:
                self.now_s = time_s
                event.action()
