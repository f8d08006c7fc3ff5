"""Makes the plan while this cache manager leads, and publishes it under the term it leads in.

The rule: everything is read from the registry before each plan, the plan before among it, so that whoever leads next
goes on with the same one; and every write is refused once the term is over.
"""

import asyncio
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

import structlog

from darkroom.errors import Deposed, RegistryUnavailable
from darkroom.policy.cacheplan import NO_PLAN, CachePlan
from darkroom.policy.planning import Pin, Planned, Situation, Wish, make_plan
from darkroom.policy.worth import LoadTimes
from darkroom.registry import keys
from darkroom.registry.cache_plan import parse_pin, parse_plan, parse_wish, plan_json
from darkroom.registry.election import Election, Fenced
from darkroom.registry.membership import ClusterView
from darkroom.registry.port import Registry
from services.cachemgr.hours import Hours
from services.cachemgr.ledger import Ledger
from services.cachemgr.situation import as_loaded, load_times, replicas, sizes_by_stage

_log = structlog.get_logger()
_RETRY_S = 0.5


class Controller:
    """The leader's work; idle in whoever does not lead."""

    def __init__(
        self,
        registry: Registry,
        election: Election,
        view: ClusterView,
        ledger: Ledger,
        *,
        guessed: LoadTimes,
        interval_s: float,
        snapshot_interval_s: float,
        clock: Callable[[], float],
        config: Planned,
        hours: Hours | None = None,
        on_pins: Callable[[Collection[str]], None],
    ) -> None:
        """`clock`: seconds that mean the same to every cache manager; `guessed`: load times that nobody has seen.

        `hours` adds to the plan what the hour of the day brings; `on_pins` is told the ids of what operators keep.
        """
        self._registry, self._election, self._view, self._ledger = registry, election, view, ledger
        self._guessed, self._config, self._clock = guessed, config, clock
        self._hours = hours
        self._interval_s, self._snapshot_interval_s = interval_s, snapshot_interval_s
        self._kept_s = self._published_s = -float("inf")
        self._version = 0
        """Of the plan that was published last: one that was damaged since must not set it back."""
        self._asked = asyncio.Event()
        self._on_pins = on_pins
        self.pins: tuple[Pin, ...] = ()
        """What operators keep on devices, as last seen."""

    async def run(self) -> None:
        """Plans whenever it leads, until cancelled."""
        await self._recall()
        async with asyncio.TaskGroup() as parts:
            parts.create_task(self._listen())
            parts.create_task(self._lead())

    async def _lead(self) -> None:
        await self._view.wait_for(lambda view: view.is_ready)
        while True:
            leading = await self._election.elected()
            self._asked.clear()
            pause_s = self._interval_s
            try:
                await self.plan_once(leading)
                await self._keep_popularity(leading)
            except RegistryUnavailable as error:
                _log.warning("plan_not_made", problem=error.message)
                pause_s = _RETRY_S
            except Deposed as error:
                _log.warning("deposed", term=leading.term, problem=error.message)
                pause_s = _RETRY_S
            await self._pause(pause_s)

    async def plan_once(self, leading: Fenced) -> CachePlan:
        """The plan that now stands. Raises RegistryUnavailable or Deposed."""
        before = _parsed_plan((await leading.read(keys.PLAN)).get(keys.PLAN))
        asked = await leading.read(keys.ASKED)
        now_s = self._clock()
        situation = self._situation(before, asked, now_s)
        plan = make_plan(situation, now_s, self._config)
        if self._hours:
            plan = await self._hours.add_to(plan, situation, leading, now_s)
        plan = replace(plan, term=leading.term, version=before.version)
        if plan != before or now_s - self._published_s >= self._config.repeat_s:
            plan = replace(plan, version=max(before.version, self._version) + 1)
            await leading.put(keys.PLAN, plan_json(plan))
            self._published_s, self._version = now_s, plan.version
            self._tell(plan, before)
        await self._forget_granted(leading, asked, situation, now_s)
        return plan

    def _situation(self, before: CachePlan, asked: Mapping[str, bytes], now_s: float) -> Situation:
        sizes = as_loaded(self._view, sizes_by_stage(self._view.models()))
        worths = {stage: self._ledger.worth(stage) for stage in sizes}
        for stage, worth in worths.items():
            worth.times = load_times(self._view, stage, self._guessed)
        wishes = [wish for wish in _wishes(asked).values() if wish.until_s > now_s]
        return Situation(
            replicas=replicas(self._view, sizes, self._ledger.busy_ids(now_s)),
            sizes=sizes,
            worths=worths,
            pins=_pins(asked),
            wishes=wishes,
            before=before,
        )

    async def _forget_granted(
        self, leading: Fenced, asked: Mapping[str, bytes], situation: Situation, now_s: float
    ) -> None:
        """Removes wishes that became orders, lapsed, or are none. The others wait for a replica to be up for them."""
        wishes = _wishes(asked)
        waiting = {
            key
            for key, wish in wishes.items()
            if wish.until_s > now_s and not any(wish.is_for(replica) for replica in situation.replicas)
        }
        for key in asked:
            if key.startswith(keys.WISHES) and key not in waiting:
                await leading.delete(key)

    async def _keep_popularity(self, leading: Fenced) -> None:
        now_s = self._clock()
        if now_s - self._kept_s >= self._snapshot_interval_s:
            await leading.put(keys.POPULARITY, self._ledger.to_json(now_s))
            self._kept_s = now_s

    async def _recall(self) -> None:
        """Takes over the popularity that the last leader kept."""
        while True:
            try:
                kept = (await self._registry.read(keys.POPULARITY)).get(keys.POPULARITY)
                break
            except RegistryUnavailable:
                await asyncio.sleep(_RETRY_S)
        if kept is not None:
            try:
                self._ledger.restore(kept)
            except ValueError as error:
                _log.warning("popularity_not_restored", problem=str(error)[:200])

    async def _listen(self) -> None:
        """Plans at once when an operator asks for something."""
        async for asked in self._registry.watch(keys.ASKED):
            self.pins = tuple(_pins(asked))
            self._on_pins([pin.model_id for pin in self.pins])
            self._asked.set()

    async def _pause(self, pause_s: float) -> None:
        try:
            async with asyncio.timeout(pause_s):
                await self._asked.wait()
        except TimeoutError:
            return

    def _tell(self, plan: CachePlan, before: CachePlan) -> None:
        known = {(order.replica_id, order.model_id, order.until_s) for order in before.orders}
        for order in plan.orders:
            if (order.replica_id, order.model_id, order.until_s) not in known:
                _log.info(
                    "ordered",
                    replica=order.replica_id,
                    model_id=order.model_id,
                    tier=order.tier.name.lower(),
                    why=order.reason,
                )


def _parsed_plan(value: bytes | None) -> CachePlan:
    try:
        return NO_PLAN if value is None else parse_plan(value)
    except ValueError as error:
        _log.warning("plan_passed_over", problem=str(error)[:200])
        return NO_PLAN


def _wishes(asked: Mapping[str, bytes]) -> dict[str, Wish]:
    found = {}
    for key, value in sorted(asked.items()):
        if key.startswith(keys.WISHES):
            try:
                found[key] = parse_wish(value)
            except ValueError as error:
                _log.warning("wish_passed_over", problem=str(error)[:200])
    return found


def _pins(asked: Mapping[str, bytes]) -> list[Pin]:
    found = []
    for key, value in sorted(asked.items()):
        if key.startswith(keys.PINS):
            try:
                found.append(parse_pin(key, value))
            except ValueError as error:
                _log.warning("pin_passed_over", problem=str(error)[:200])
    return found
