"""The pairs of a base and LoRAs that a replica keeps merged: looked over and made beside requests, by `policy/fusion`.

The rule: merged copies live in what is left. They push nothing out, and leave before any LoRA or model does: a copy is
made anew in seconds and without I/O. A request keeps the copy that it began with.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import structlog
import torch

from darkroom.errors import Overloaded, Unavailable
from darkroom.models.adapted import Scaled
from darkroom.models.adapters import Adapters, stand_in_carrying
from darkroom.models.loader import Part
from darkroom.models.merged import Merged, merge, merged_bytes
from darkroom.models.program import Ticket
from darkroom.models.residency import Beside
from darkroom.policy.fusion import Pair, PairCosts, choose_fused
from darkroom.wire.tasks import LoraUse

_log = structlog.get_logger()
_LOOK_INTERVAL_S = 10.0
_RETRY_S = 30.0
"""Until a pair is tried again for which there was no room, or no store to read from: others have their turn."""
_GUESSED_PACE_S = 2e-9
"""Seconds that merging takes for each byte, until it was measured."""

Uses = tuple[LoraUse, ...]


@dataclass(frozen=True, slots=True)
class MergedState:
    """A merged pair, as the replica tells of it."""

    loras: Uses
    size_bytes: int


@dataclass(slots=True, eq=False)
class _Asked:
    """A pair that requests have asked for."""

    model_id: str
    uses: Uses
    name: str
    size_bytes: int | None
    """What its copy takes; None if it cannot be merged."""
    due_s: float = 0.0
    """Before that it is not tried."""


@dataclass(slots=True, eq=False)
class _Copy:
    """A merged pair, or one that is being merged."""

    pair: _Asked
    size_bytes: int
    networks: Mapping[str, Merged] = field(default_factory=dict)
    """Empty until it is made, and once it is gone."""
    holder_count: int = 0
    is_leaving: bool = False
    """Whether it goes once nobody holds it."""


class Held:
    """A merged copy that a request holds while it runs: a context manager."""

    def __init__(self, part: Part, copy: _Copy, release: Callable[[_Copy], None]) -> None:
        self._part, self._copy, self._release = part, copy, release
        copy.holder_count += 1

    def stand_ins(self) -> dict[str, torch.nn.Module]:
        """By component name, what to put into the request's own pipeline in place of the part's stand-ins."""
        return {
            name: stand_in_carrying(getattr(self._part.pipeline, name), merged)
            for name, merged in self._copy.networks.items()
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._copy.holder_count -= 1
        self._release(self._copy)


@dataclass(slots=True, kw_only=True, eq=False)
class MergedPairs:
    """Those of one replica. Its methods are called on one event loop; weights are merged on a thread."""

    most: int
    """Pairs at once."""
    max_bytes: float
    """Of all copies together, where the device leaves so much."""
    borrow: Callable[[str], AbstractAsyncContextManager[Adapters | None]]
    """A model's LoRAs, which stay with it meanwhile; None if the model is not here."""
    room: Callable[[str], Beside]
    """What is counted beside a model that is here."""
    free_bytes: Callable[[], float]
    """What nothing on the device has."""
    clock: Callable[[], float] = time.monotonic
    costs: PairCosts = field(default_factory=PairCosts)
    _asked: dict[str, _Asked] = field(default_factory=dict)
    _copies: dict[str, _Copy] = field(default_factory=dict)
    _pace_s: float = _GUESSED_PACE_S
    _due_s: float = 0.0
    _looking: asyncio.Task[None] | None = None

    def take(self, part: Part, uses: Uses) -> Held | None:
        """The merged copy of a pair, for one request; None if there is none, or it is this one's turn to run beside."""
        copy = self._copies.get(name_of(part.model_id, uses))
        if copy is None or not copy.networks or copy.is_leaving or self.costs.takes_turn_beside(copy.pair.name):
            return None
        return Held(part, copy, self._release)

    def ran(self, part: Part, uses: Uses, ticket: Ticket, loras: Sequence[Scaled] | None) -> None:
        """Notes a request that is done, with the LoRAs that it ran beside the base, or None if it ran merged."""
        name = name_of(part.model_id, uses)
        if loras is not None and name not in self._asked:
            self._asked[name] = _Asked(part.model_id, uses, name, merged_bytes(part.networks, loras))
        self.costs.add(name, self.clock(), adapted_s=ticket.adapted_s, bare_s=ticket.bare_s, is_merged=loras is None)
        if self.clock() >= self._due_s and (self._looking is None or self._looking.done()):
            self._due_s = self.clock() + _LOOK_INTERVAL_S
            self._looking = asyncio.create_task(self.look())

    async def look(self) -> None:
        """Lets go of what is not worth it any more, and merges the best pair that is not merged yet."""
        chosen = self._chosen()
        for name, copy in list(self._copies.items()):
            copy.is_leaving = name not in chosen
            self._release(copy)
        for name in chosen:
            pair = self._asked[name]
            is_due = name not in self._copies and self.clock() >= pair.due_s
            if is_due and len(self._copies) < self.most and self._fits(pair):
                await self._merge(pair)
                break

    def sparable(self) -> dict[str, int]:
        """Bytes of copies that no request holds, by the name that their model counts them under."""
        sizes: Counter[str] = Counter()
        for copy in self._copies.values():
            if copy.networks and not copy.holder_count:
                sizes[self.room(copy.pair.model_id).name] += copy.size_bytes
        return sizes

    def spare(self, needed_bytes: float) -> None:
        """Lets go of copies that no request holds until so many bytes are free, those asked for least first."""
        rates = self.costs.rates(self.clock())
        for name in sorted(self._copies, key=lambda name: (rates.get(name, 0.0), name)):
            copy = self._copies[name]
            if needed_bytes > 0 and copy.networks and not copy.holder_count:
                self._drop(copy)
                needed_bytes -= copy.size_bytes

    def forget(self, model_id: str) -> None:
        """Lets go of a model's copies: it is gone."""
        self._asked = {name: pair for name, pair in self._asked.items() if pair.model_id != model_id}
        for name in [name for name, copy in self._copies.items() if copy.pair.model_id == model_id]:
            self._copies.pop(name).networks = {}

    def states(self, model_id: str) -> tuple[MergedState, ...]:
        """A model's merged pairs."""
        mine = [copy for copy in self._copies.values() if copy.pair.model_id == model_id and copy.networks]
        return tuple(MergedState(copy.pair.uses, copy.size_bytes) for copy in mine)

    def close(self) -> None:
        """Looks no more."""
        if self._looking is not None:
            self._looking.cancel()

    @property
    def _merged_bytes(self) -> int:
        return sum(copy.size_bytes for copy in self._copies.values())

    def _chosen(self) -> list[str]:
        rates = self.costs.rates(self.clock())
        self._asked = {name: pair for name, pair in self._asked.items() if name in rates or name in self._copies}
        pairs = {
            name: Pair(
                rate=rates.get(name, 0.0),
                adapter_s=self.costs.adapter_s(name),
                displaced_s=0.0,
                make_s=0.0 if name in self._copies else pair.size_bytes * self._pace_s,
                size_bytes=pair.size_bytes,
            )
            for name, pair in self._asked.items()
            if pair.size_bytes is not None
        }
        room_bytes = min(self.max_bytes, self._merged_bytes + self.free_bytes())
        return choose_fused(pairs, frozenset(self._copies), most=self.most, room_bytes=room_bytes)

    def _fits(self, pair: _Asked) -> bool:
        assert pair.size_bytes is not None
        return pair.size_bytes <= min(self.max_bytes - self._merged_bytes, self.free_bytes())

    async def _merge(self, pair: _Asked) -> None:
        start_s = self.clock()
        try:
            async with self.borrow(pair.model_id) as adapters:
                if adapters is not None:
                    await self._make(pair, adapters)
        except Exception as error:  # noqa: BLE001 - requests run beside the base, whatever keeps their pair from merging
            if isinstance(error, Overloaded | Unavailable):
                pair.due_s = self.clock() + _RETRY_S
            else:
                pair.size_bytes = None
            _log.warning("not_merged", pair=pair.name, problem=str(error), error=type(error).__name__)
            return
        copy = self._copies.get(pair.name)
        if copy is not None:
            seconds = self.clock() - start_s
            self._pace_s = seconds / max(copy.size_bytes, 1)
            _log.info("merged", pair=pair.name, size_bytes=copy.size_bytes, seconds=round(seconds, 3))

    async def _make(self, pair: _Asked, adapters: Adapters) -> None:
        """Merges a pair, unless its LoRAs, which may have to be read, took the room for it."""
        with await adapters.load(pair.uses) as combination:
            if not self._fits(pair):
                return
            assert pair.size_bytes is not None
            copy = self._copies[pair.name] = _Copy(pair, pair.size_bytes)
            await self.room(pair.model_id).take(self._bytes_of(pair.model_id))
            try:
                copy.networks = await asyncio.to_thread(merge, adapters.part.networks, combination.loras)
            finally:
                if not copy.networks:
                    self._drop(copy)

    def _release(self, copy: _Copy) -> None:
        if copy.is_leaving and copy.networks and not copy.holder_count:
            self._drop(copy)

    def _drop(self, copy: _Copy) -> None:
        del self._copies[copy.pair.name]
        copy.networks = {}
        self.room(copy.pair.model_id).shrink(self._bytes_of(copy.pair.model_id))
        _log.info("unmerged", pair=copy.pair.name, size_bytes=copy.size_bytes)

    def _bytes_of(self, model_id: str) -> int:
        return sum(copy.size_bytes for copy in self._copies.values() if copy.pair.model_id == model_id)


def name_of(model_id: str, uses: Uses) -> str:
    """A pair's name: equal for equal LoRAs at equal scales, in the same order."""
    return "+".join([model_id, *(f"{use.lora_id}:{use.scale!r}" for use in uses)])
