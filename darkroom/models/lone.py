"""Networks that stand alone: folders of the model store that belong to no model, each loaded by id on first use.

ControlNets are such, and the image encoders of IP-Adapters. Requests with different models share them.
"""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import structlog
import torch

from darkroom.errors import InvalidRequest, NotFound, Overloaded
from darkroom.models.loader import NetworkState, network_state
from darkroom.models.residency import Beside, Entry, Residency

_log = structlog.get_logger()
_MAX_CONFIG_BYTES = 1 << 20
_CONCURRENT_LOADS = 32
"""One must not wait for another: most of the time of a load is spent waiting for a disk or a server."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoneNetwork:
    """One of them: here with its weights, or elsewhere and here by its config only."""

    model_id: str
    name: str
    """By which other replicas call it."""
    network: Any
    face: torch.nn.Module
    """What stands for it in pipelines."""
    device: torch.device
    load_s: float

    @property
    def networks(self) -> Mapping[str, torch.nn.Module]:
        """The network by its name."""
        return {self.name: self.network}

    def stand_in(self, name: str) -> torch.nn.Module | None:
        """What stands for the network of that name."""
        return self.face if name == self.name else None

    def network_states(self) -> list[NetworkState]:
        """How much of it is here."""
        return [network_state(self.name, self.network)]


def read_config(folder: Path) -> dict[str, Any]:
    """The object in `config.json`. Raises OSError or ValueError."""
    try:
        with (folder / "config.json").open() as file:
            config = json.loads(file.read(_MAX_CONFIG_BYTES + 1))
    except RecursionError as error:
        raise ValueError("config.json is nested too deeply") from error
    if not isinstance(config, dict):
        raise ValueError("config.json is no object")  # noqa: TRY004 - of the file, not of an argument
    return config


K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


class OnDemand(Generic[K, T]):
    """What the requests of a replica share, loaded on first use. Its methods are called on one event loop."""

    def __init__(
        self,
        load: Callable[[K], T],
        *,
        max_count: int | None = None,
        measure: Callable[[K], Mapping[str, int]] | None = None,
    ) -> None:
        """`load` runs on a thread of its own; past `max_count` what was asked for least recently is let go.

        `measure`: bytes that it will take on the device, by component; it runs on such a thread too.
        """
        self._load, self._max_count, self._measure = load, max_count, measure
        self._threads = ThreadPoolExecutor(_CONCURRENT_LOADS, thread_name_prefix="load")
        self._loads: dict[K, asyncio.Task[T]] = {}
        self._entries: dict[K, Entry] = {}
        self.residency: Residency = Residency()
        """What it is counted in."""
        self.on_loaded: Callable[[T], Awaitable[None]] | None = None
        """Told of each that is added."""
        self.on_dropped: Callable[[T], None] | None = None
        """Told of each that goes to make room."""

    async def get(self, key: K) -> T:
        """What `load` makes of the key; concurrent callers share one load, and see what it raises.

        A failed load is tried again by the next request. What a request gets here stays while it runs.
        """
        task = self._loads.pop(key, None)
        if task is None:
            self._entries[key] = Entry(str(key), lambda: self._drop(key), models=self._model_ids(key))
            task = asyncio.create_task(self._loaded(key))
            task.add_done_callback(lambda task: task.cancelled() or task.exception())  # all callers may have left
        self._loads[key] = task  # the last of all
        self.residency.hold(self._entries[key])
        if self._max_count is not None and len(self._loads) > self._max_count:
            self._forget(next(key for key, other in self._loads.items() if other is not task))
        return await asyncio.shield(task)

    def beside(self, key: K, name: str) -> Beside:
        """Room for what is kept beside what `get` gave for the key."""
        return Beside(self.residency, self._entries[key], name)

    def _model_ids(self, key: K) -> tuple[str, ...]:
        """What it is made of, by ids in the model store."""
        return (str(key),)

    def __contains__(self, key: K) -> bool:
        """Whether it is here, or on its way."""
        return key in self._loads

    @property
    def loaded(self) -> tuple[T, ...]:
        """Those that are here."""
        done = [task for task in self._loads.values() if task.done() and not task.cancelled()]
        return tuple(task.result() for task in done if task.exception() is None)

    def forget(self, is_meant: Callable[[K], bool]) -> None:
        """Lets go of those whose key is meant; requests that have them go on with them."""
        for key in [key for key in self._loads if is_meant(key)]:
            self._forget(key)

    def release(self, key: K) -> bool:
        """Drops what is loaded unless a request uses it. Returns whether it is gone."""
        entry = self._entries.get(key)
        if entry is None:
            return True
        if not entry.is_loaded or entry.holder_count:
            return False
        self.residency.remove(entry)
        self._drop(key)
        return True

    def _forget(self, key: K) -> None:
        del self._loads[key]
        self.residency.remove(self._entries.pop(key))

    def _drop(self, key: K) -> None:
        task = self._loads.pop(key)
        del self._entries[key]
        if self.on_dropped:
            self.on_dropped(task.result())

    async def _loaded(self, key: K) -> T:
        loop, start_s, entry = asyncio.get_running_loop(), time.monotonic(), self._entries[key]
        try:
            if self._measure is not None and self.residency.budget_bytes:
                entry.sizes = await loop.run_in_executor(self._threads, self._measure, key)
            await self.residency.admit(entry)
            made = await loop.run_in_executor(self._threads, self._load, key)
        except BaseException as error:
            self.residency.remove(entry)
            if self._loads.get(key) is asyncio.current_task():
                del self._loads[key], self._entries[key]
            level = "info" if isinstance(error, InvalidRequest | NotFound | Overloaded) else "error"
            getattr(_log, level)("load_failed", model_id=key, problem=str(error), cause=repr(error.__cause__))
            raise
        entry.is_loaded, entry.used_s = True, time.monotonic()
        _log.info("loaded", model_id=key, load_s=round(time.monotonic() - start_s, 3))
        if self.on_loaded:
            await self.on_loaded(made)
        return made
