"""Attempts of the same run: a later one ends an earlier one, so that work is not done twice after a pause."""

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Any

from darkroom.errors import StaleEpoch


class Attempts:
    """The attempts that run on this replica, by run."""

    def __init__(self) -> None:
        self._running: dict[str, tuple[int, asyncio.Future[Any]]] = {}

    @contextlib.contextmanager
    def running(self, run_id: str, epoch: int, work: "asyncio.Future[Any]") -> Iterator[None]:
        """While `work` is awaited as an attempt of a run; an empty id names none.

        Raises StaleEpoch if a later attempt runs already, or when one comes: `work` is then cancelled.
        """
        if not run_id:
            yield
            return
        latest, earlier = self._running.get(run_id, (-1, None))
        if latest >= epoch:
            raise StaleEpoch(str(epoch), str(latest))
        if earlier is not None:
            earlier.cancel()
        self._running[run_id] = (epoch, work)
        try:
            yield
        except asyncio.CancelledError:
            latest, _ = self._running[run_id]
            if latest > epoch:
                raise StaleEpoch(str(epoch), str(latest)) from None
            raise
        finally:
            if self._running[run_id][0] == epoch:
                del self._running[run_id]
