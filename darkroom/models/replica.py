"""What the stages have in common: parts of models loaded on demand, one executor, a bound on accepted requests."""

import asyncio
import contextlib
import time
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import structlog
import torch

from darkroom.errors import DarkroomError, Moved, QueueFull, Stalled
from darkroom.models.adapters import Adapters, Combination
from darkroom.models.executor import EngineCounts, Executor
from darkroom.models.loader import Part, load_part, part_sizes
from darkroom.models.lone import LoneNetwork, OnDemand
from darkroom.models.lora_file import Refused, weights_file
from darkroom.models.merging import MergedPairs, MergedState
from darkroom.models.program import Ticket
from darkroom.models.remote import Send
from darkroom.models.residency import Asker, Residency
from darkroom.models.store.host import Corrupt
from darkroom.models.store.model_store import ModelStore, store_of
from darkroom.models.tiers import Copy, PartTiers
from darkroom.policy.appraisal import Asked
from darkroom.policy.worth import Tier
from darkroom.wire.tasks import LoraUse

T = TypeVar("T")
_log = structlog.get_logger()
_RETRY_AFTER_S = "1"
_WATCH_INTERVAL_S = 0.5
_CONCURRENT_PREFETCHES = 4
"""On threads of their own: from afar one may take minutes, and what requests do must not wait behind it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaState:
    """What a replica says of itself."""

    replica_id: str
    stage: str
    device: str
    parts: tuple[Part | LoneNetwork, ...]
    merged: Mapping[str, tuple[MergedState, ...]]
    """Pairs that are kept merged, by model id."""
    running_count: int
    finished_count: int
    engine: EngineCounts
    uptime_s: float


class StageReplica:
    """One replica of a stage: the parts it has loaded and the requests it runs."""

    def __init__(
        self,
        *,
        replica_id: str,
        stage: str,
        model_store: Path | ModelStore,
        device: str,
        max_running: int,
        max_batch_rows: int,
        thread_count: int,
        slot_count: int = 32,
        max_lora_bytes: int = 2 << 30,
        device_budget_bytes: int = 0,
    ) -> None:
        """`max_running`: requests accepted at once; `slot_count`: those of them that are on the device.

        `max_batch_rows`: rows of a batch; `thread_count`: of torch; `max_lora_bytes`: of each part's LoRAs together;
        `device_budget_bytes`: of all that is loaded, 0 for no bound. Called inside an event loop.
        """
        self.replica_id, self.stage = replica_id, stage
        self._device = torch.device(device)
        self.store = store_of(model_store)
        """Where all that it loads comes from."""
        self._max_running = max_running
        self._executor = Executor(
            max_batch_rows=max_batch_rows,
            slot_count=slot_count,
            thread_count=thread_count,
            stage=stage,
            probes=stage == "denoiser",
        )
        self._stalled: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._parts: OnDemand[str, Part] = OnDemand(
            lambda model_id: load_part(self.store, model_id, stage, self._device, send=self.send),
            measure=lambda model_id: part_sizes(self.store, model_id, stage, self._device),
        )
        self.eviction = self.store.eviction
        """What decides what leaves the device, and what lies behind it."""
        self._residency = Residency(device_budget_bytes, eviction=self.eviction)
        self._shared: list[OnDemand[Any, Any]] = []
        self._announced: dict[str, Copy] = {}
        self._tiers = PartTiers(self.store, stage)
        self.share(self._parts)
        self._max_lora_bytes = max_lora_bytes
        self._merging: MergedPairs | None = None
        self._running = self._finished = self._hint_count = 0
        self._start_s = time.monotonic()
        self.send: Send | None = None
        """Calls networks that other stages hold."""
        self.on_loaded: Callable[[Collection[str]], Awaitable[None]] | None = None
        """Told the ids of all that is loaded, when something is added or dropped."""
        self.on_dropped: Callable[[str], None] | None = None
        """Told the id of what is dropped to make room: whatever was made of it must go too."""
        self._announcing: set[asyncio.Task[None]] = set()
        self._prefetching: set[str] = set()
        self._prefetches = ThreadPoolExecutor(_CONCURRENT_PREFETCHES, thread_name_prefix="prefetch")

    @contextlib.asynccontextmanager
    async def accepted(self) -> AsyncIterator[None]:
        """Counts a request while it runs. Raises QueueFull."""
        if self._running >= self._max_running:
            raise QueueFull(str(self._max_running), _RETRY_AFTER_S)
        self._running += 1
        try:
            with self.holding():
                yield
        finally:
            self._running -= 1
            self._finished += 1

    def __contains__(self, model_id: str) -> bool:
        """Whether its part of the model is here, or on its way."""
        return model_id in self._parts

    def holding(self) -> contextlib.AbstractContextManager[None]:
        """What is asked for inside stays loaded until the end; a request holds what it uses."""
        return self._residency.holding()

    @contextlib.contextmanager
    def preparing(self) -> Iterator[None]:
        """What is asked for inside only a hint asks for: it waits for no room, and pushes out what is idle.

        Not what other hints brought, though, while their requests are waited for.
        """
        self._hint_count += 1
        try:
            with self._residency.asking(Asker.HINT):
                yield
        finally:
            self._hint_count -= 1

    def share(self, shared: OnDemand[Any, Any]) -> None:
        """What requests here share beside the parts of models: it is announced and described with them."""
        self._shared.append(shared)
        shared.residency = self._residency
        shared.on_loaded, shared.on_dropped = self._announce, self._announce_dropped

    async def _announce(self, added: LoneNetwork | Part) -> None:
        device_bytes = sum(state.resident_bytes for state in added.network_states())
        self._announced[added.model_id] = Copy(device_bytes=device_bytes, load_s=added.load_s)
        if self.on_loaded:
            await self.on_loaded(set(self._announced))

    def _announce_dropped(self, dropped: LoneNetwork | Part) -> None:
        self._announced.pop(dropped.model_id, None)
        if self._merging and dropped.model_id not in self._parts:  # not only what was made of it
            self._merging.forget(dropped.model_id)
        if isinstance(dropped, Part):
            adapters = dropped.beside.pop("loras", None)
            if adapters:
                adapters.close()
        if self.on_dropped:
            self.on_dropped(dropped.model_id)
        if self.on_loaded:
            task = asyncio.ensure_future(self.on_loaded(set(self._announced)))
            self._announcing.add(task)
            task.add_done_callback(self._announcing.discard)

    async def part(self, model_id: str, loras: Sequence[LoraUse] = ()) -> Part:
        """The stage's part of a model, loaded on first use; concurrent callers share one load.

        If it is not here, the files of `loras`, which will be asked for next, are fetched beside it.

        Raises ModelNotFound, UnusableModel or StoreUnavailable. A failed load is tried again by the next request.
        """
        self.prefetch(model_id, loras)
        return await self._parts.get(model_id)

    def prefetch(self, model_id: str, loras: Sequence[LoraUse]) -> None:
        """Fetches the LoRAs' files unless the part that they are for is here, or on its way."""
        if model_id not in self._parts:
            for use in loras:
                self._prefetch(use.lora_id)

    @property
    def is_idle(self) -> bool:
        """Whether it has no request, and loads nothing for one to come."""
        return not self._running and not self._hint_count

    async def bring(self, model_id: str, tier: Tier) -> None:
        """Brings its part of a model to a tier, for later requests. Raises what `part` raises, or DeviceFull.

        Nothing that hints brought makes room for it while their requests are waited for.
        """
        if tier is Tier.DEVICE:
            with self._residency.asking(Asker.ORDER):
                await self.part(model_id)
        else:
            await asyncio.to_thread(self._tiers.bring, model_id, tier)

    async def release(self, model_id: str) -> bool:
        """Lets a model go from device and memory unless it is used or must stay. Returns whether it is gone."""
        if model_id in self.eviction.pinned or not self._parts.release(model_id):
            return False
        await asyncio.to_thread(self.store.forget, model_id)
        return True

    def keep(self, model_ids: frozenset[str]) -> None:
        """From now on these stay once they are here, and no others. Loads that wait for room look again."""
        if model_ids != self.eviction.pinned:
            self.eviction.pin(model_ids)
            self._residency.look_again()

    def tell(self, asked: Mapping[str, Asked], *, fresh_s: float) -> None:
        """What the whole cluster is asked for counts for so long in what leaves."""
        self.eviction.tell(asked, fresh_s=fresh_s)

    def copies(self, model_ids: Collection[str]) -> dict[str, Copy]:
        """What it has of models, on any tier: of those it ever had, and of `model_ids`. Looks at the disk."""
        return self._tiers.copies(dict(self._announced), model_ids)

    def _prefetch(self, lora_id: str) -> None:
        """Whatever goes wrong is said when the LoRA is asked for."""
        if lora_id in self._prefetching:
            return
        self._prefetching.add(lora_id)

        def fetch() -> None:
            with contextlib.suppress(DarkroomError, Refused, Corrupt, OSError):
                self.store.read(weights_file(self.store, lora_id))

        work = asyncio.get_running_loop().run_in_executor(self._prefetches, fetch)
        work.add_done_callback(lambda _: self._prefetching.discard(lora_id))

    @contextlib.asynccontextmanager
    async def adapted(
        self, part: Part, loras: Sequence[LoraUse], ticket: Ticket | None = None
    ) -> AsyncIterator[Mapping[str, torch.nn.Module]]:
        """Stand-ins that draw with these LoRAs, by component, held while inside; read beside whatever runs.

        A request that gives its ticket, and does not have to run alone, gets weights with the LoRAs merged where they
        are kept so. Raises LoraNotFound, InvalidField, UnusableLora, QueueFull or DeviceFull.
        """
        if not loras:
            yield {}
            return
        self._residency.uses(use.lora_id for use in loras)
        uses = tuple(loras)
        merging = self._merging_of(part) if ticket and not ticket.alone else None
        merged = merging.take(part, uses) if merging else None
        with merged or await self._adapters_of(part).load(uses) as held:
            yield held.stand_ins()
        if merging and ticket:
            merging.ran(part, uses, ticket, held.loras if isinstance(held, Combination) else None)

    def keep_merged(self, most: int, max_bytes: float) -> None:
        """From now on keeps up to so many pairs of a model and LoRAs merged, in so many bytes together."""
        self._merging = MergedPairs(
            most=most,
            max_bytes=max_bytes,
            borrow=self._borrowed,
            room=lambda model_id: self._parts.beside(model_id, f"merged {model_id}"),
            free_bytes=lambda: self._residency.free_bytes,
        )
        self._residency.spare, self._residency.sparable = self._merging.spare, self._merging.sparable

    def _merging_of(self, part: Part) -> MergedPairs | None:
        """What keeps pairs of a part merged; a part with IP-Adapters, made of another, has none."""
        return self._merging if any(part is own for own in self._parts.loaded) else None

    @contextlib.asynccontextmanager
    async def _borrowed(self, model_id: str) -> AsyncIterator[Adapters | None]:
        with self.holding():
            yield self._adapters_of(await self._parts.get(model_id)) if model_id in self._parts else None

    def _adapters_of(self, part: Part) -> Adapters:
        adapters: Adapters = part.beside.get("loras") or self._new_adapters(part)
        part.beside["loras"] = adapters
        return adapters

    def _new_adapters(self, part: Part) -> Adapters:
        room = self._parts.beside(part.model_id, f"loras {id(part)}")  # with IP-Adapters, it is a part of its own
        adapters = Adapters(part, self.store, self._max_lora_bytes, room)
        weakref.finalize(adapters, room.release).atexit = False
        return adapters

    async def run(self, program: Callable[[], T], ticket: Ticket) -> T:
        """Runs a program in the executor. Cancelling this call ends the program at its next stop. Raises Stalled."""
        start_s = time.monotonic()
        future, _ = self._executor.submit(program, ticket=ticket)
        work = asyncio.wrap_future(future)
        try:
            await asyncio.wait((work, self._stalled), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise Stalled(self.replica_id)
            return work.result()
        finally:
            work.cancel()
            self._residency.ran(time.monotonic() - start_s)

    async def watch(self) -> None:
        """Until cancelled, looks whether the engine comes back from its forwards. Raises Stalled when it does not.

        All requests are then given up: a thread inside a forward cannot be ended, only its process can.
        """
        while self._executor.overdue_s(time.monotonic()) <= 0:  # noqa: ASYNC110 - a stuck thread sets no event
            await asyncio.sleep(_WATCH_INTERVAL_S)
        self._stalled.set_result(None)
        raise Stalled(self.replica_id)

    def hand_back(self) -> None:
        """Ends, with Moved, every request whose caller can go on elsewhere, after its current step."""
        self._executor.hand_back(Moved(self.replica_id))

    def state(self) -> ReplicaState:
        """The replica as it is now."""
        held = [part for shared in self._shared for part in shared.loaded]
        return ReplicaState(
            replica_id=self.replica_id,
            stage=self.stage,
            device=str(self._device),
            parts=tuple(sorted(held, key=lambda part: part.model_id)),
            merged={part.model_id: self._merging.states(part.model_id) for part in held} if self._merging else {},
            running_count=self._running,
            finished_count=self._finished,
            engine=self._executor.counts,
            uptime_s=time.monotonic() - self._start_s,
        )

    def close(self) -> None:
        """Ends the executor; a stalled one ends with its process."""
        if self._merging:
            self._merging.close()
        self._prefetches.shutdown(wait=False, cancel_futures=True)
        if not self._stalled.done():
            self._executor.close()
