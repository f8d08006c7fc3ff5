"""What a replica's device holds, and which of it requests are using.

The rule: what a request uses stays until the request is done; what nobody uses goes when something else needs the room.
All of it runs on one event loop.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field

import structlog

from darkroom.errors import DeviceFull, UnusableModel
from darkroom.store.residents import Evict, Resident, least_recently_used

_log = structlog.get_logger()
_WAIT_S = 10.0
"""How long a load waits for requests that use what is in its way."""
_RETRY_AFTER_S = "5"


@dataclass(slots=True, eq=False)
class Entry:
    """Something that is on the device, or on its way there."""

    name: str
    """The model's id, for people."""
    drop: Callable[[], None]
    """Lets it go."""
    sizes: Mapping[str, int] = field(default_factory=dict)
    """Bytes of each of its components: those of one name are there once, whoever else has them."""
    load_s: float = 0.0
    last_use_s: float = field(default_factory=time.monotonic)
    holder_count: int = 0
    is_loaded: bool = False


class Residency:
    """The entries of one replica."""

    def __init__(self, budget_bytes: int = 0, *, evict: Evict = least_recently_used, wait_s: float = _WAIT_S) -> None:
        """`budget_bytes`: of all entries together; 0 bounds nothing."""
        self.budget_bytes, self._evict, self._wait_s = budget_bytes, evict, wait_s
        self._entries: list[Entry] = []
        self._released = asyncio.Event()
        self.pinned_names: frozenset[str] = frozenset()
        """Of what stays although nobody uses it."""

    @contextlib.contextmanager
    def holding(self) -> Iterator[None]:
        """Whatever is asked for inside, by this task and those that it starts, stays until the end."""
        before, held = _held.get(), list[Entry]()
        _held.set(held)
        try:
            yield
        finally:
            _held.set(before)
            for entry in held:
                entry.holder_count -= 1
                entry.last_use_s = time.monotonic()
            self._released.set()

    def hold(self, entry: Entry) -> None:
        """Holds an entry for whoever is inside `holding`; for nobody outside."""
        entry.last_use_s = time.monotonic()
        held = _held.get()
        if held is not None:
            held.append(entry)
            entry.holder_count += 1

    async def admit(self, entry: Entry) -> None:
        """Makes room for an entry and counts it in. Raises UnusableModel if it can never fit, or DeviceFull."""
        own_bytes = sum(entry.sizes.values())
        if self.budget_bytes and own_bytes > self.budget_bytes:
            problem = f"it needs {own_bytes} bytes, and the device has {self.budget_bytes} for models"
            raise UnusableModel(entry.name, problem)
        deadline_s = time.monotonic() + self._wait_s
        while not self._make_room(entry):
            self._released.clear()
            try:
                async with asyncio.timeout(deadline_s - time.monotonic()):
                    await self._released.wait()
            except TimeoutError:
                raise DeviceFull(entry.name, _RETRY_AFTER_S) from None
        if self.budget_bytes:
            self._entries.append(entry)

    def remove(self, entry: Entry) -> None:
        """Counts an entry out: it is gone, or did not come."""
        if entry in self._entries:
            self._entries.remove(entry)
            self._released.set()

    def _may_go(self, entry: Entry) -> bool:
        return entry.is_loaded and not entry.holder_count and entry.name not in self.pinned_names

    def _make_room(self, entry: Entry) -> bool:
        """Drops idle entries until this one fits. False, and nothing dropped, if it would not even then."""
        if not self.budget_bytes:
            return True
        idle = [other for other in self._entries if self._may_go(other)]
        busy = [other for other in self._entries if other not in idle]
        if _total((*busy, entry)) > self.budget_bytes:
            return False
        while (needed := _total((*self._entries, entry)) - self.budget_bytes) > 0:
            names = {str(number): other for number, other in enumerate(idle)}
            residents = [
                Resident(
                    name=name,
                    size_bytes=sum(other.sizes.values()),
                    load_s=other.load_s,
                    last_use_s=other.last_use_s,
                )
                for name, other in names.items()
            ]
            chosen = self._evict(residents, needed, time.monotonic()) or [*names]
            for name in chosen:
                dropped = names[name]
                idle.remove(dropped)
                self._entries.remove(dropped)
                dropped.drop()
                _log.info(
                    "dropped", model_id=dropped.name, size_bytes=sum(dropped.sizes.values()), for_model=entry.name
                )
        return True


_held: ContextVar[list[Entry] | None] = ContextVar("held", default=None)


def _total(entries: Iterable[Entry]) -> int:
    sizes: dict[str, int] = {}
    for entry in entries:
        sizes |= entry.sizes
    return sum(sizes.values())
