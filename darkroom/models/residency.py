"""What a replica's device holds, and which of it requests are using.

The rule: what a request uses stays until the request is done; what nobody uses goes when something else needs the room.
What only hints have asked for waits for no room, and for a while makes none for other hints, nor for orders of the
plan. All of it runs on one event loop.
"""

import asyncio
import contextlib
import enum
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field

import structlog

from darkroom.errors import DeviceFull, UnusableModel
from darkroom.policy.eviction import Resident
from darkroom.policy.worth import Tier
from darkroom.store.evicting import Eviction

_log = structlog.get_logger()
_WAIT_S = 10.0
"""How long a load waits for requests that use what is in its way."""
_RETRY_AFTER_S = "5"
_EXPECTED_S = 60.0
"""How long a request that a hint told of is waited for, from when what it needs is here: it may have been given up."""


class Asker(enum.IntEnum):
    """Who asks for something, the one that counts most last."""

    ORDER = 0
    """The plan."""
    HINT = 1
    """Of a request to come."""
    REQUEST = 2


_asker: ContextVar[Asker] = ContextVar("asker", default=Asker.REQUEST)


@dataclass(slots=True, eq=False)
class Entry:
    """Something that is on the device, or on its way there."""

    name: str
    """The model's id, for people."""
    drop: Callable[[], None]
    """Lets it go."""
    sizes: Mapping[str, int] = field(default_factory=dict)
    """Bytes of each of its components: those of one name are there once, whoever else has them."""
    models: tuple[str, ...] = ()
    """Ids in the model store of what it is made of."""
    used_s: float = field(default_factory=time.monotonic)
    holder_count: int = 0
    is_loaded: bool = False
    asked_by: Asker = field(default_factory=_asker.get)
    """Of all that have asked for it so far, the one that counts most."""

    def is_expected(self, now_s: float) -> bool:
        """Whether a request is still to come for it, by a hint that is not too old."""
        return self.asked_by is Asker.HINT and now_s < self.used_s + _EXPECTED_S


@dataclass(frozen=True, slots=True)
class Beside:
    """Room on the device for what is kept beside an entry, and goes with it."""

    residency: "Residency"
    entry: Entry
    name: str

    def clear(self, size_bytes: int) -> bool:
        """Lets go of what is worth less than any entry until it may have so many bytes. Returns whether it may."""
        return self.residency.clear(self.entry, self.name, size_bytes)

    async def take(self, size_bytes: int) -> None:
        """Has so many bytes from now on. Raises DeviceFull, and has as many as before."""
        await self.residency.grow(self.entry, self.name, size_bytes)

    @property
    def size_bytes(self) -> int:
        """What it has."""
        return self.entry.sizes.get(self.name, 0)

    def shrink(self, size_bytes: int) -> None:
        """Has no more than so many from now on."""
        self.residency.shrink(self.entry, self.name, size_bytes)

    def release(self) -> None:
        """Has none any more. May be called from any thread."""
        self.entry.sizes = {name: size for name, size in self.entry.sizes.items() if name != self.name}


@dataclass(slots=True)
class _Use:
    """What one request uses."""

    entries: list[Entry] = field(default_factory=list)
    models: set[str] = field(default_factory=set)
    run_s: float | None = None
    """How long it ran so far; None until it does."""


class Residency:
    """The entries of one replica."""

    def __init__(self, budget_bytes: int = 0, *, eviction: Eviction | None = None, wait_s: float = _WAIT_S) -> None:
        """`budget_bytes`: of all entries together; 0 bounds nothing. `eviction` hears what requests use."""
        self.budget_bytes, self._wait_s = budget_bytes, wait_s
        self._eviction = eviction or Eviction()
        self._evict = self._eviction.of(Tier.DEVICE, self._held_bytes)
        self._entries: list[Entry] = []
        self._released = asyncio.Event()
        self.spare: Callable[[float], None] = lambda _needed_bytes: None
        """Asked, before any entry goes, to let go of so many bytes that are worth less, as far as there are such."""
        self.sparable: Callable[[], Mapping[str, int]] = dict
        """How many bytes that would be, by the name that entries count them under."""

    @contextlib.contextmanager
    def holding(self) -> Iterator[None]:
        """Whatever is asked for inside, by this task and those that it starts, stays until the end."""
        before, use = _using.get(), _Use()
        _using.set(use)
        try:
            yield
        finally:
            _using.set(before)
            for entry in use.entries:
                entry.holder_count -= 1
                entry.used_s = time.monotonic()
            if use.run_s is not None:
                self._eviction.ran(use.models, use.run_s)
            self._released.set()

    @contextlib.contextmanager
    def asking(self, asker: Asker) -> Iterator[None]:
        """Whatever is asked for inside, by this task and those that it starts, is asked for by that one."""
        token = _asker.set(asker)
        try:
            yield
        finally:
            _asker.reset(token)

    def hold(self, entry: Entry) -> None:
        """Holds an entry for whoever is inside `holding`; for nobody outside."""
        entry.used_s = time.monotonic()
        entry.asked_by = max(entry.asked_by, _asker.get())
        use = _using.get()
        if use is not None:
            use.entries.append(entry)
            use.models.update(entry.models)
            entry.holder_count += 1

    def uses(self, model_ids: Iterable[str]) -> None:
        """Notes what else of the model store whoever is inside `holding` uses."""
        use = _using.get()
        if use is not None:
            use.models.update(model_ids)

    def ran(self, seconds: float) -> None:
        """Notes for how long whoever is inside `holding` has kept the device busy."""
        use = _using.get()
        if use is not None:
            use.run_s = (use.run_s or 0.0) + seconds

    async def admit(self, entry: Entry) -> None:
        """Makes room for an entry and counts it in. Raises UnusableModel if it can never fit, or DeviceFull.

        For a hint nobody waits: DeviceFull comes at once, before a request could join that may wait itself.
        """
        own_bytes = sum(entry.sizes.values())
        if self.budget_bytes and own_bytes > self.budget_bytes:
            problem = f"it needs {own_bytes} bytes, and the device has {self.budget_bytes} for models"
            raise UnusableModel(entry.name, problem)
        await self._wait_for_room(entry)
        if self.budget_bytes:
            self._entries.append(entry)

    async def grow(self, entry: Entry, name: str, size_bytes: int) -> None:
        """Counts what is kept beside an entry and goes with it, in place of what has that name. Raises DeviceFull."""
        before_bytes = entry.sizes.get(name, 0)
        entry.sizes = {**entry.sizes, name: size_bytes}
        try:
            await self._wait_for_room(entry)
        except DeviceFull:
            self.shrink(entry, name, before_bytes)
            raise
        self._released.set()  # it may have become smaller

    def shrink(self, entry: Entry, name: str, size_bytes: int) -> None:
        """Counts less of what is kept beside an entry."""
        entry.sizes = {**entry.sizes, name: size_bytes}
        self._released.set()

    @property
    def free_bytes(self) -> float:
        """What nothing has; infinite without a bound."""
        return self.budget_bytes - _total(self._entries) if self.budget_bytes else math.inf

    def clear(self, entry: Entry, name: str, size_bytes: int) -> bool:
        """Lets go of what is worth less than any entry until this one can grow so. Returns whether it can."""
        more_bytes = size_bytes - entry.sizes.get(name, 0)
        lacking = self._lacking_bytes((*self._entries, entry)) + more_bytes
        if lacking > 0:
            self.spare(lacking)
            lacking = self._lacking_bytes((*self._entries, entry)) + more_bytes
        return lacking <= 0

    async def _wait_for_room(self, entry: Entry) -> None:
        deadline_s = time.monotonic() + self._wait_s
        while not self._make_room(entry):
            if entry.asked_by is Asker.HINT:
                raise DeviceFull(entry.name, _RETRY_AFTER_S)
            self._released.clear()
            try:
                async with asyncio.timeout(deadline_s - time.monotonic()):
                    await self._released.wait()
            except TimeoutError:
                raise DeviceFull(entry.name, _RETRY_AFTER_S) from None

    def look_again(self) -> None:
        """Other entries may go now than a moment ago: loads that wait for room try anew."""
        self._released.set()

    def remove(self, entry: Entry) -> None:
        """Counts an entry out: it is gone, or did not come."""
        if entry in self._entries:
            self._entries.remove(entry)
            self._released.set()

    def _held_bytes(self, model_id: str) -> int:
        return sum(sum(entry.sizes.values()) for entry in list(self._entries) if model_id in entry.models)

    def _make_room(self, entry: Entry) -> bool:
        """Drops idle entries until this one fits. False, and nothing gone, if it would not even then."""
        needed = self._lacking_bytes((*self._entries, entry))
        if needed <= 0:
            return True
        if not self._could_fit(entry):
            return False
        self.spare(needed)
        for dropped in self._going(entry):
            self._entries.remove(dropped)
            dropped.drop()
            size_bytes = sum(dropped.sizes.values())
            _log.info("dropped", model_id=dropped.name, size_bytes=size_bytes, for_model=entry.name)
        return True

    def _lacking_bytes(self, entries: Iterable[Entry]) -> float:
        return _total(entries) - (self.budget_bytes or math.inf)

    def _could_fit(self, entry: Entry) -> bool:
        """Whether it would fit without all that may go."""
        staying = [*self._without(self._chosen([entry], math.inf, entry)), entry]
        names = {name for each in staying for name in each.sizes}
        return self._lacking_bytes(staying) <= sum(size for name, size in self.sparable().items() if name in names)

    def _going(self, entry: Entry) -> list[Entry]:
        """What goes, so that an entry fits which could."""
        going: list[Entry] = []
        while (needed := self._lacking_bytes((*self._without(going), entry))) > 0:
            chosen = self._chosen([*going, entry], needed, entry)
            assert chosen, "it could fit"
            going += chosen
        return going

    def _without(self, going: Collection[Entry]) -> list[Entry]:
        return [entry for entry in self._entries if entry not in going]

    def _chosen(self, going: Collection[Entry], needed_bytes: float, for_entry: Entry) -> list[Entry]:
        """More entries that may go besides those: what shares components frees less than its size."""
        now_s, is_request = time.monotonic(), for_entry.asked_by is Asker.REQUEST
        idle = [
            entry
            for entry in self._without(going)
            if entry.is_loaded and not entry.holder_count and any(entry.sizes.values())
            if is_request or not entry.is_expected(now_s)
        ]
        residents = [
            Resident(name=str(number), size_bytes=sum(each.sizes.values()), used_s=each.used_s, models=each.models)
            for number, each in enumerate(idle)
        ]
        return [idle[int(name)] for name in self._evict(residents, needed_bytes)]


_using: ContextVar[_Use | None] = ContextVar("using", default=None)


def _total(entries: Iterable[Entry]) -> int:
    sizes: dict[str, int] = {}
    for entry in entries:
        sizes |= entry.sizes
    return sum(sizes.values())
