"""A stage replica follows the cache manager's plan, and says what it has.

The rule: the plan is advice. What it asks is done one thing at a time, while no request runs or beside those that it
does not disturb, and under steady load after half a minute; what goes wrong is logged and tried again later; without a
plan everything goes on as it would.
"""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import replace
from typing import Protocol

import structlog

from darkroom.errors import DarkroomError
from darkroom.models.tiers import Copy
from darkroom.policy.appraisal import Asked
from darkroom.policy.cacheplan import CachePlan, Order, Release
from darkroom.policy.worth import Tier
from darkroom.registry.cache_plan import PlanView
from darkroom.registry.residence import Residence

_log = structlog.get_logger()
_LOOK_INTERVAL_S = 0.25
_REPORT_INTERVAL_S = 2.0
_RETRY_S = 10.0
_TELL_INTERVAL_S = 5.0
"""Between two looks at who else has copies, while the plan stays the same."""
_FRESH_S = 60.0
"""How long a plan's rates count: three times as long as a leader lets pass before it publishes the plan again."""
_PATIENCE_S = 30.0
"""How long an order waits for the replica to be idle: under steady load it never is."""

_PROBLEM_LENGTH = 200
"""Of what goes to the registry."""


class Holder(Protocol):
    """What a plan moves models about in."""

    @property
    def is_idle(self) -> bool:
        """Whether it has no request, and loads nothing for one to come."""

    async def bring(self, model_id: str, tier: Tier) -> None:
        """Brings a model to a tier. Raises DarkroomError."""

    async def release(self, model_id: str) -> bool:
        """Drops a model unless it is needed. Returns whether it is gone."""

    def keep(self, model_ids: frozenset[str]) -> None:
        """From now on these stay, and no others."""

    def tell(self, asked: Mapping[str, Asked], *, fresh_s: float) -> None:
        """What the whole cluster is asked for counts for so long in what leaves."""

    def copies(self, model_ids: Collection[str]) -> dict[str, Copy]:
        """What it has of models. Looks at the disk."""


class PlanFollower:
    """One replica's part of the plan, carried out."""

    def __init__(
        self,
        replica_id: str,
        stage: str,
        holder: Holder,
        plans: PlanView,
        elsewhere: Callable[[], Mapping[str, tuple[int, int, int]]] = dict,
        *,
        is_apart: bool = False,
    ) -> None:
        """`elsewhere`: copies of models that other replicas have, by tier.

        `is_apart`: whether the device has a memory of its own. Then requests do not notice what comes to the host's or
        to disk.
        """
        self._replica_id, self._stage, self._holder, self._plans = replica_id, stage, holder, plans
        self._elsewhere, self._is_apart = elsewhere, is_apart
        self._told: tuple[int, int] | None = None
        """Term and version of the plan that was passed on last."""
        self._told_s = self._seen_s = -math.inf
        self._done: dict[Order | Release, float] = {}
        """What was carried out, and when it lapses."""
        self._retry_s: dict[Order, float] = {}
        self._since_s: dict[Order, float] = {}
        """Since when each waits for the replica to be idle."""
        self._problems: dict[Order, str] = {}
        self._bringing: asyncio.Task[None] | None = None

    @property
    def problems(self) -> dict[str, str]:
        """By model, why what was ordered and stands could not be done."""
        return {order.model_id: problem for order, problem in self._problems.items()}

    async def run(self) -> None:
        """Follows until cancelled."""
        try:
            while True:
                await self.follow(self._plans.plan)
                await asyncio.sleep(_LOOK_INTERVAL_S)
        finally:
            if self._bringing is not None:
                self._bringing.cancel()

    async def follow(self, plan: CachePlan) -> None:
        """Does what can be done now: lets go of all that is to go, and begins with one thing that is to come."""
        now_s = time.time()
        self._done = {item: until_s for item, until_s in self._done.items() if until_s > now_s}
        self._holder.keep(plan.pinned_at(self._replica_id))
        self._tell(plan, time.monotonic())
        for release in plan.releases_of(self._replica_id):
            if release not in self._done and await self._holder.release(release.model_id):
                self._done[release] = release.until_s
        orders = [order for order in plan.orders_of(self._replica_id) if not order.is_done and order.until_s > now_s]
        self._since_s = {order: self._since_s.get(order, time.monotonic()) for order in orders}
        self._retry_s = {order: self._retry_s[order] for order in orders if order in self._retry_s}
        self._problems = {order: self._problems[order] for order in orders if order in self._problems}
        if self._bringing is None or self._bringing.done():
            due = next((order for order in orders if order not in self._done and self._is_time_for(order)), None)
            self._bringing = asyncio.create_task(self._carry_out(due)) if due else None

    def _tell(self, plan: CachePlan, now_s: float) -> None:
        """Passes on what models are asked for: of a new plan at once, then as long as nobody has to doubt it."""
        if (plan.term, plan.version) != self._told:
            self._told, self._seen_s = (plan.term, plan.version), now_s
        elif now_s < self._told_s + _TELL_INTERVAL_S:
            return
        self._told_s = now_s
        self._holder.tell(plan.asked_at(self._stage, self._elsewhere()), fresh_s=self._seen_s + _FRESH_S - now_s)

    def _is_time_for(self, order: Order) -> bool:
        now_s = time.monotonic()
        if self._retry_s.get(order, 0.0) > now_s:
            return False
        is_beside = self._is_apart and order.tier is not Tier.DEVICE
        return is_beside or self._holder.is_idle or now_s - self._since_s[order] > _PATIENCE_S

    async def _carry_out(self, order: Order) -> None:
        start_s = time.monotonic()
        facts = {"model_id": order.model_id, "tier": order.tier.name.lower(), "why": order.reason}
        try:
            await self._holder.bring(order.model_id, order.tier)
        except DarkroomError as error:
            self._put_off(order, f"{error.reason()}: {error.message}")
            _log.warning("order_failed", **facts, reason=error.reason(), problem=error.message)
            return
        except Exception as error:  # noqa: BLE001 - whatever it is, the replica goes on serving
            self._put_off(order, repr(error))
            _log.exception("order_failed", **facts)
            return
        self._done[order] = order.until_s
        self._problems.pop(order, None)
        _log.info("order_done", **facts, took_s=round(time.monotonic() - start_s, 3))

    def _put_off(self, order: Order, problem: str) -> None:
        """Tries it again later, and beside requests much later."""
        self._problems[order] = problem[:_PROBLEM_LENGTH]
        self._since_s[order] = time.monotonic()
        self._retry_s[order] = self._since_s[order] + _RETRY_S


class CopyReporter:
    """Says what a replica has: at once what comes to its device or leaves it, soon after what else has changed."""

    def __init__(
        self,
        holder: Holder,
        model_ids: Callable[[], Collection[str]],
        say: Callable[[Mapping[str, Residence]], Awaitable[None]],
        *,
        tells_disk: bool,
        problems: Callable[[], Mapping[str, str]] = dict,
    ) -> None:
        """`model_ids`: those to look for, beside what `holder` ever had; `tells_disk`: whether disk is worth saying.

        `problems`: by model, why it could not be brought nearer.
        """
        self._holder, self._model_ids, self._say, self._tells_disk = holder, model_ids, say, tells_disk
        self._problems = problems
        self._looking = asyncio.Lock()
        self._said: dict[str, Residence] = {}

    async def run(self) -> None:
        """Looks and says, until cancelled."""
        while True:
            await asyncio.sleep(_REPORT_INTERVAL_S)
            await self.report()

    async def changed(self, loaded: Collection[str]) -> None:
        """Something came to the device or left it: says so at once, and of all else what was seen last."""
        del loaded  # which `holder` knows in more detail
        async with self._looking:
            seen = {model_id: replace(said, device_bytes=None) for model_id, said in self._said.items()}
            await self._tell({**seen, **await asyncio.to_thread(self._look, ())})

    async def report(self) -> None:
        """Says what there is."""
        async with self._looking:  # or an older look could be said after a newer one
            await self._tell(await asyncio.to_thread(self._look, self._model_ids()))

    def _look(self, model_ids: Collection[str]) -> dict[str, Residence]:
        return {model_id: self._residence(copy) for model_id, copy in self._holder.copies(model_ids).items()}

    async def _tell(self, residences: Mapping[str, Residence]) -> None:
        problems = self._problems()
        found = {**dict.fromkeys(problems, Residence()), **residences}
        known = {model_id: replace(each, problem=problems.get(model_id)) for model_id, each in found.items()}
        said = {model_id: residence for model_id, residence in known.items() if _is_worth_saying(residence)}
        if said != self._said:
            self._said = said
            await self._say(said)

    def _residence(self, copy: Copy) -> Residence:
        return Residence(
            device_bytes=copy.device_bytes,
            host_bytes=copy.host_bytes,
            disk_bytes=copy.disk_bytes if self._tells_disk else None,
            load_s=None if copy.load_s is None else round(copy.load_s, 3),
        )


def _is_worth_saying(residence: Residence) -> bool:
    return replace(residence, load_s=None) != Residence()
