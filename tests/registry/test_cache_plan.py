"""Plans, pins and wishes survive the registry; a view never goes back to an older leader's plan."""

import asyncio
from dataclasses import replace

import pytest

from darkroom.policy.cacheplan import NO_PLAN, CachePlan, Order, Outlook, Pinned, Release, StageOutlook
from darkroom.policy.planning import Pin, Wish
from darkroom.policy.popularity import Band
from darkroom.policy.worth import Tier
from darkroom.registry import keys
from darkroom.registry.cache_plan import PlanView, parse_pin, parse_plan, parse_wish, pin_json, plan_json, wish_json
from darkroom.registry.memory import MemoryRegistry
from darkroom.registry.residence import LOADED, Residence
from tests.registry.following import running, until

PLAN = CachePlan(
    term=7,
    version=3,
    orders=(
        Order(replica_id="vae-1", model_id="sd", tier=Tier.HOST, until_s=5.5, reason="why", is_wished=True),
        Order(replica_id="vae-2", model_id="sd", tier=Tier.DEVICE, until_s=6.5, reason="", is_done=True),
    ),
    releases=(Release(replica_id="vae-1", model_id="flux", until_s=9.0),),
    pinned=(Pinned(replica_id="vae-1", model_id="sd"),),
    outlooks=(
        Outlook(
            model_id="sd",
            band=Band.HOT,
            stages={"vae": StageOutlook(rate=0.5, run_s=1.5)},
        ),
    ),
)


def test_what_is_written_is_read() -> None:
    assert parse_plan(plan_json(PLAN)) == PLAN
    assert parse_plan(plan_json(NO_PLAN)) == NO_PLAN
    wish = Wish(model_id="sd", until_s=1.0, is_drop=True, tier=Tier.DISK, stage="vae", replica_id="vae-1", copies=3)
    for each in (wish, Wish(model_id="sd", until_s=1.0)):
        assert parse_wish(wish_json(each)) == each
    for pin in (Pin(model_id="sd"), Pin(model_id="sd", copies=None)):
        assert parse_pin(keys.pin("sd"), pin_json(pin)) == pin
    full = Residence(device_bytes=1, host_bytes=2, disk_bytes=3, load_s=0.5, problem="DEVICE_FULL")
    for residence in (Residence(), full):
        assert Residence.from_json(residence.to_json()) == residence
    assert Residence.from_json(b"") == LOADED


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b'{"term": -1}',
        b"\xff",
        b'{"device_bytes": -1}',
        b'{"load_s": NaN}',
        b'{"problem": 1}',
        b"[" * 100_000,
    ],
)
def test_what_is_none_is_refused(value: bytes) -> None:
    for parse in (parse_plan, parse_wish, lambda value: parse_pin(keys.pin("sd"), value)):
        with pytest.raises(ValueError, match="not a"):
            parse(value)
    if value not in {b"", b"{}", b'{"term": -1}'}:
        with pytest.raises(ValueError, match="not a residency"):
            Residence.from_json(value)


async def test_a_view_passes_over_an_older_leaders_plan_and_what_is_no_plan() -> None:
    registry, seen = MemoryRegistry(), list[CachePlan]()
    view = PlanView(registry)

    async def follow() -> None:
        async for plan in view.changes():
            seen.append(plan)

    async with running(view.run()), running(follow()):
        await until(lambda: seen == [NO_PLAN])
        await registry.put(keys.PLAN, plan_json(PLAN))
        await until(lambda: view.plan == PLAN)
        for value in (plan_json(replace(PLAN, term=6, version=9)), plan_json(replace(PLAN, version=2)), b"damaged"):
            await registry.put(keys.PLAN, value)
            await asyncio.sleep(0.05)
            assert view.plan == PLAN
        later = replace(PLAN, term=8, version=4)
        await registry.put(keys.PLAN, plan_json(later))
        await until(lambda: seen == [NO_PLAN, PLAN, later])


async def test_a_view_cut_off_keeps_the_plan_and_one_whose_registry_lost_all_starts_again() -> None:
    registry = MemoryRegistry()
    view = PlanView(registry)
    await registry.put(keys.PLAN, plan_json(PLAN))
    async with running(view.run()):
        await until(lambda: view.plan == PLAN)
        registry.set_reachable(is_reachable=False)
        await asyncio.sleep(0.05)
        assert view.plan == PLAN
        registry.set_reachable(is_reachable=True)
        await registry.delete(keys.PLAN)
        await until(lambda: view.plan == NO_PLAN)
        first = replace(PLAN, term=1, version=1)
        await registry.put(keys.PLAN, plan_json(first))
        await until(lambda: view.plan == first)
