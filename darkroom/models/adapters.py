"""LoRAs of a loaded part: loaded on demand beside whatever runs, kept within bounds, each request with its own.

All but the reading of files happens on the event loop. A request holds a `Combination` while it runs; what nobody holds
goes when room is needed, least recently used first. Combinations cost next to nothing themselves: they share the LoRAs'
weights, and a scale is a factor of the request, or of each output channel if the LoRA has magnitudes.
"""

import asyncio
import contextlib
import copy
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from darkroom.errors import InvalidField, LoraNotFound, QueueFull, UnusableLora
from darkroom.models.adapted import AdaptedNetwork, Mix, Scaled
from darkroom.models.dora import Factors, factors_of
from darkroom.models.forwards import Adapter, carrying
from darkroom.models.loader import Part
from darkroom.models.lora import KEPT_SCALES, Lora, read_lora
from darkroom.models.lora_file import Refused, Unfit
from darkroom.models.residency import Beside
from darkroom.models.store.model_store import ModelStore
from darkroom.store.header import MAX_HEADER_BYTES
from darkroom.wire.tasks import LoraUse

_RETRY_AFTER_S = "1"
_CONCURRENT_READS = 2


@dataclass(slots=True, eq=False)
class _Kept:
    """A LoRA that is loaded, or being loaded, and how many requests hold it."""

    task: asyncio.Task[Lora]
    holder_count: int = 0
    computing: asyncio.Lock = field(default_factory=asyncio.Lock)
    factors: OrderedDict[float, Factors] = field(default_factory=OrderedDict)
    """Of the scales asked for last, at most `KEPT_SCALES` of them; requests hold their own beyond that."""

    @property
    def size_bytes(self) -> int:
        """Memory held; 0 until it is loaded."""
        is_loaded = self.task.done() and not self.task.cancelled() and self.task.exception() is None
        return self.task.result().size_bytes if is_loaded else 0


class Combination:
    """The LoRAs of one request, in order. Held while the request runs: a context manager."""

    def __init__(self, part: Part, networks: Mapping[str, AdaptedNetwork], held: list[tuple[_Kept, Scaled]]) -> None:
        """Made by `Adapters.load` only; `held` is released once."""
        self._part, self._networks, self._held = part, networks, held
        self.loras = tuple(scaled for _, scaled in held)

    @property
    def elsewhere(self) -> frozenset[str]:
        """Networks of other stages that these LoRAs change too: those stages need the LoRAs as well."""
        return frozenset[str]().union(*(scaled.lora.elsewhere for scaled in self.loras))

    def stand_ins(self) -> dict[str, torch.nn.Module]:
        """By component name, what to put into the request's own pipeline in place of the part's stand-ins."""
        return {
            name: stand_in_carrying(getattr(self._part.pipeline, name), Mix(self._networks[name], name, self.loras))
            for name in changed_networks(self.loras)
        }

    def release(self) -> None:
        """Lets the LoRAs go when room is needed. Forwards that still run keep what they use."""
        for kept, _ in self._held:
            kept.holder_count -= 1
        self._held = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


@dataclass(slots=True, weakref_slot=True, eq=False)
class Adapters:
    """The LoRAs of one part. Its methods are called on one event loop."""

    part: Part
    store: Path | ModelStore
    max_bytes: int = 2 << 30
    """Of all LoRAs together, as they are in memory."""
    room: Beside | None = None
    """On the device, which others have to share."""
    _kept: OrderedDict[str, _Kept] = field(default_factory=OrderedDict)
    _networks: dict[str, AdaptedNetwork] = field(default_factory=dict)
    _taking: asyncio.Lock = field(default_factory=asyncio.Lock)
    _reading: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_CONCURRENT_READS))

    def resident(self) -> dict[str, int]:
        """Bytes of each LoRA that is loaded, the least recently used first."""
        return {lora_id: kept.size_bytes for lora_id, kept in self._kept.items() if kept.size_bytes}

    async def load(self, uses: Sequence[LoraUse]) -> Combination:
        """The combination of these LoRAs, read from the store where they are not here; concurrent reads are one.

        Raises LoraNotFound, InvalidField for one that is not for this model, UnusableLora for a bad file, QueueFull or
        DeviceFull if running requests hold all the room there is.
        """
        check_uses(uses)
        held = [(self._hold(use.lora_id), use.scale) for use in uses]
        try:
            for position, (use, (kept, _)) in enumerate(zip(uses, held, strict=True)):
                with _named(position, use.lora_id):
                    await asyncio.shield(kept.task)
            await self._make_room()
            scaled = [(kept, await self._scaled(kept, scale)) for kept, scale in held]
        except BaseException:
            for kept, _ in held:
                kept.holder_count -= 1
            self._drop_unheld(self.max_bytes)
            if self.room:
                self._drop_unheld(self.room.size_bytes)
            raise
        return Combination(self.part, self._networks, scaled)

    def close(self) -> None:
        """Lets go of the part's memory, whoever still points here; its LoRAs are not drawn with any more."""
        for network in self._networks.values():
            network.close()
        self._networks.clear()

    def _hold(self, lora_id: str) -> _Kept:
        kept = self._kept.get(lora_id)
        if kept is None:
            kept = self._kept[lora_id] = _Kept(asyncio.create_task(self._read(lora_id)))
            kept.task.add_done_callback(lambda task: task.cancelled() or task.exception())  # all may have left
        self._kept.move_to_end(lora_id)
        kept.holder_count += 1
        return kept

    async def _read(self, lora_id: str) -> Lora:
        try:
            async with self._reading:
                return await asyncio.to_thread(self._read_and_adapt, lora_id)
        except BaseException:
            del self._kept[lora_id]  # the next request tries again
            raise

    def _read_and_adapt(self, lora_id: str) -> Lora:
        """Runs on a thread of its own."""
        lora = read_lora(self.part, self.store, lora_id, max_bytes=2 * self.max_bytes + MAX_HEADER_BYTES)
        if lora.size_bytes > self.max_bytes:
            raise Refused(f"takes {lora.size_bytes} bytes; at most {self.max_bytes} are allowed")
        for name, deltas in lora.networks.items():
            network = self._networks.setdefault(name, AdaptedNetwork(self.part.networks[name]))
            network.adapt(deltas)
        return lora

    async def _scaled(self, kept: _Kept, scale: float) -> Scaled:
        """The LoRA at this scale, with the factors that its magnitudes need; concurrent computations are one."""
        lora = kept.task.result()
        if not lora.has_magnitudes:
            return Scaled(lora, scale)
        async with kept.computing:
            if scale not in kept.factors:
                kept.factors[scale] = await asyncio.to_thread(factors_of, lora, self.part.networks, scale)
            kept.factors.move_to_end(scale)
            while len(kept.factors) > KEPT_SCALES:
                kept.factors.popitem(last=False)
            return Scaled(lora, scale, kept.factors[scale])

    async def _make_room(self) -> None:
        """Raises QueueFull or DeviceFull if there is no room even without what nobody holds."""
        if self._drop_unheld(self.max_bytes) > self.max_bytes:
            raise QueueFull(str(sum(kept.holder_count for kept in self._kept.values()) - 1), _RETRY_AFTER_S)
        if self.room is None:
            return
        async with self._taking:
            total_bytes = self._total_bytes()
            while not self.room.clear(total_bytes) and (left := self._drop_unheld(total_bytes - 1)) < total_bytes:
                total_bytes = left
            await self.room.take(total_bytes)

    def _total_bytes(self) -> int:
        return sum(kept.size_bytes for kept in self._kept.values())

    def _drop_unheld(self, limit_bytes: int) -> int:
        """Drops what nobody holds, least recently used first, until the rest fits. Returns the bytes of the rest."""
        total_bytes = self._total_bytes()
        for lora_id, kept in list(self._kept.items()):
            if total_bytes <= limit_bytes:
                break
            if not kept.holder_count and kept.size_bytes:
                total_bytes -= kept.size_bytes
                del self._kept[lora_id]
        return total_bytes


def changed_networks(loras: Iterable[Scaled]) -> list[str]:
    """Names of the networks here that these LoRAs change."""
    return sorted({name for scaled in loras for name in scaled.lora.networks})


def stand_in_carrying(stand_in: torch.nn.Module, adapter: Adapter) -> torch.nn.Module:
    """A stand-in like this one, whose calls carry the adapter."""
    copied = copy.copy(stand_in)

    def call(*args: Any, **kwargs: Any) -> Any:
        with carrying(adapter):
            return stand_in(*args, **kwargs)

    copied.__dict__["forward"] = call
    return copied


def check_uses(uses: Sequence[LoraUse]) -> None:
    """Raises InvalidField."""
    seen: dict[str, int] = {}
    for position, use in enumerate(uses):
        if use.lora_id in seen:
            raise InvalidField(f"loras[{position}].lora_id", f"repeats loras[{seen[use.lora_id]}]")
        seen[use.lora_id] = position


@contextlib.contextmanager
def _named(position: int, lora_id: str) -> Iterator[None]:
    """Turns what reading a LoRA raises into an error that names it."""
    try:
        yield
    except FileNotFoundError as error:
        raise LoraNotFound(f"loras[{position}].lora_id", lora_id) from error
    except Unfit as error:
        raise InvalidField(f"loras[{position}]", f"({lora_id}) {error}") from error
    except Refused as error:
        raise UnusableLora(f"loras[{position}]", lora_id, f"it {error}") from error
