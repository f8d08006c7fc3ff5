"""The cache manager's plan and operators' wishes, as the registry keeps them."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

from darkroom.policy.cacheplan import NO_PLAN, CachePlan, Order, Outlook, Pinned, Release, StageOutlook
from darkroom.policy.planning import Pin, Wish
from darkroom.policy.popularity import Band
from darkroom.policy.worth import Tier
from darkroom.registry import keys
from darkroom.registry.json_fields import finite, items, text, whole, yes
from darkroom.registry.port import Registry

_PROBLEMS = (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError)


def plan_json(plan: CachePlan) -> bytes:
    """Equal plans give equal bytes."""
    return _compact(
        {
            "term": plan.term,
            "version": plan.version,
            "orders": [
                {
                    "replica_id": order.replica_id,
                    "model_id": order.model_id,
                    "tier": order.tier.name.lower(),
                    "until_s": order.until_s,
                    "reason": order.reason,
                    "is_wished": order.is_wished,
                    "is_done": order.is_done,
                }
                for order in plan.orders
            ],
            "releases": [
                {"replica_id": release.replica_id, "model_id": release.model_id, "until_s": release.until_s}
                for release in plan.releases
            ],
            "pinned": [{"replica_id": pin.replica_id, "model_id": pin.model_id} for pin in plan.pinned],
            "outlooks": [
                {
                    "model_id": outlook.model_id,
                    "band": outlook.band.value,
                    "stages": {
                        stage: {"rate": seen.rate, "run_s": seen.run_s} for stage, seen in outlook.stages.items()
                    },
                }
                for outlook in plan.outlooks
            ],
        }
    )


def parse_plan(value: bytes) -> CachePlan:
    """Raises ValueError for what is no plan. Fields of later versions are passed over."""
    try:
        fields = json.loads(value)
        return CachePlan(
            term=whole(fields["term"]),
            version=whole(fields["version"]),
            orders=tuple(_order(item) for item in items(fields["orders"])),
            releases=tuple(_release(item) for item in items(fields["releases"])),
            pinned=tuple(
                Pinned(replica_id=text(item["replica_id"]), model_id=text(item["model_id"]))
                for item in items(fields["pinned"])
            ),
            outlooks=tuple(_outlook(item) for item in items(fields["outlooks"])),
        )
    except _PROBLEMS as error:
        raise ValueError(f"not a plan: {error!r}") from error


def wish_json(wish: Wish) -> bytes:
    """A wish as it waits for the leader."""
    return _compact(
        {
            "model_id": wish.model_id,
            "until_s": wish.until_s,
            "is_drop": wish.is_drop,
            "tier": wish.tier.name.lower(),
            "stage": wish.stage,
            "replica_id": wish.replica_id,
            "copies": wish.copies,
        }
    )


def parse_wish(value: bytes) -> Wish:
    """Raises ValueError for what is no wish."""
    try:
        fields = json.loads(value)
        return Wish(
            model_id=text(fields["model_id"]),
            until_s=finite(fields["until_s"]),
            is_drop=yes(fields["is_drop"]),
            tier=_tier(fields["tier"]),
            stage=None if fields["stage"] is None else text(fields["stage"]),
            replica_id=None if fields["replica_id"] is None else text(fields["replica_id"]),
            copies=whole(fields["copies"]),
        )
    except _PROBLEMS as error:
        raise ValueError(f"not a wish: {error!r}") from error


def pin_json(pin: Pin) -> bytes:
    """A pin as it is kept."""
    return _compact({"copies": pin.copies})


def parse_pin(key: str, value: bytes) -> Pin:
    """Raises ValueError for what is no pin."""
    try:
        copies = json.loads(value)["copies"]
        return Pin(model_id=keys.parse_pin(key), copies=None if copies is None else whole(copies))
    except _PROBLEMS as error:
        raise ValueError(f"not a pin: {error!r}") from error


class PlanView:
    """The plan as last seen. Reading it costs no I/O and never fails; without a registry the last one stays."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._changed = asyncio.Event()
        self.plan = NO_PLAN
        self.is_read = False
        """Whether the registry was read once."""

    async def run(self) -> None:
        """Follows the registry until cancelled."""
        async for state in self._registry.watch(keys.PLAN):
            self._take(state)
            self.is_read = True
            self._changed.set()
            self._changed = asyncio.Event()

    async def changes(self) -> AsyncIterator[CachePlan]:
        """The plan as soon as there is one to know of, then each that replaces it. Never ends by itself."""
        shown: CachePlan | None = None
        while True:
            changed = self._changed
            if self.is_read and self.plan != shown:
                shown = self.plan
                yield shown
            else:
                await changed.wait()

    def _take(self, state: Mapping[str, bytes]) -> None:
        """A registry that has lost the plan has lost its terms too: they count from the beginning again."""
        value = state.get(keys.PLAN)
        if value is None:
            self.plan = NO_PLAN
            return
        try:
            plan = parse_plan(value)
        except ValueError:
            return  # of a later version, or damaged: the leader writes another soon
        if (plan.term, plan.version) >= (self.plan.term, self.plan.version):
            self.plan = plan


def _compact(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _tier(value: object) -> Tier:
    return Tier[text(value).upper()]


def _order(item: Any) -> Order:
    return Order(
        replica_id=text(item["replica_id"]),
        model_id=text(item["model_id"]),
        tier=_tier(item["tier"]),
        until_s=finite(item["until_s"]),
        reason=text(item["reason"]),
        is_wished=yes(item["is_wished"]),
        is_done=yes(item["is_done"]),
    )


def _release(item: Any) -> Release:
    return Release(
        replica_id=text(item["replica_id"]), model_id=text(item["model_id"]), until_s=finite(item["until_s"])
    )


def _outlook(item: Any) -> Outlook:
    return Outlook(
        model_id=text(item["model_id"]),
        band=Band(item["band"]),
        stages={
            text(stage): StageOutlook(rate=finite(seen["rate"]), run_s=finite(seen["run_s"]))
            for stage, seen in item["stages"].items()
        },
    )
