"""A replica follows the plan, one thing at a time, when it is idle or has waited long enough, and says what it has."""

import asyncio
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

import pytest

from darkroom.errors import DeviceFull
from darkroom.models.tiers import Copy
from darkroom.policy.appraisal import Asked
from darkroom.policy.cacheplan import CachePlan, Order, Outlook, Pinned, Release, StageOutlook
from darkroom.policy.planning import Planned
from darkroom.policy.popularity import Band
from darkroom.policy.worth import Tier
from darkroom.registry.cache_plan import PlanView
from darkroom.registry.memory import MemoryRegistry
from darkroom.registry.residence import Residence
from darkroom.runtime import following
from darkroom.runtime.following import CopyReporter, PlanFollower
from tests.registry.following import until

CONFIG = Planned()


@dataclass
class Shelf:
    """A holder of names."""

    is_idle: bool = True
    held: dict[str, Copy] = field(default_factory=dict)
    brought: list[tuple[str, Tier]] = field(default_factory=list)
    kept: frozenset[str] = frozenset()
    told: list[tuple[dict[str, Asked], float]] = field(default_factory=list)
    in_use: set[str] = field(default_factory=set)
    is_full: bool = False
    gate: asyncio.Event = field(default_factory=asyncio.Event)

    async def bring(self, model_id: str, tier: Tier) -> None:
        self.brought.append((model_id, tier))
        if self.is_full:
            raise DeviceFull(model_id, "5")
        await self.gate.wait()
        self.held[model_id] = Copy(device_bytes=1)

    async def release(self, model_id: str) -> bool:
        if model_id in self.in_use:
            return False
        self.held.pop(model_id, None)
        return True

    def keep(self, model_ids: frozenset[str]) -> None:
        self.kept = model_ids

    def tell(self, asked: Mapping[str, Asked], *, fresh_s: float) -> None:
        self.told.append((dict(asked), fresh_s))

    def copies(self, model_ids: Collection[str]) -> dict[str, Copy]:
        del model_ids  # it knows what it has
        return dict(self.held)


def order(model_id: str, *, left_s: float = 60.0, tier: Tier = Tier.DEVICE, is_wished: bool = False) -> Order:
    return Order(
        replica_id="r",
        model_id=model_id,
        tier=tier,
        until_s=time.time() + left_s,
        reason="",
        is_wished=is_wished,
    )


def follower(shelf: Shelf, *, is_apart: bool = False) -> PlanFollower:
    return PlanFollower("r", "denoiser", shelf, PlanView(MemoryRegistry()), is_apart=is_apart)


async def rest() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_orders_are_carried_out_one_after_the_other_and_each_once() -> None:
    shelf = Shelf()
    following_plan, plan = follower(shelf), CachePlan(orders=(order("a"), order("b", tier=Tier.HOST)))
    for _ in range(3):
        await following_plan.follow(plan)
        await rest()
    assert shelf.brought == [("a", Tier.DEVICE)], "the second waits for the first"
    shelf.gate.set()
    for _ in range(4):
        await rest()
        await following_plan.follow(plan)
    assert shelf.brought == [("a", Tier.DEVICE), ("b", Tier.HOST)]
    del shelf.held["a"]  # pushed out by a request's model
    await following_plan.follow(plan)
    await rest()
    assert len(shelf.brought) == 2


async def test_nothing_is_brought_while_requests_run_or_for_others_or_too_late() -> None:
    shelf = Shelf(is_idle=False)
    plan = CachePlan(orders=(order("a"), order("w", is_wished=True)))
    following_plan = follower(shelf)
    await following_plan.follow(plan)
    shelf.is_idle = True
    late, other = order("late", left_s=-1.0), replace(order("other"), replica_id="s")
    await following_plan.follow(CachePlan(orders=(late, other, replace(order("done"), is_done=True))))
    await rest()
    assert shelf.brought == []


@pytest.mark.parametrize("tier", [Tier.DEVICE, Tier.HOST, Tier.DISK])
@pytest.mark.parametrize("is_wished", [False, True])
async def test_nothing_waits_for_ever_for_requests_to_end(tier: Tier, *, is_wished: bool) -> None:
    shelf = Shelf(is_idle=False)
    plan = CachePlan(orders=(order("a", tier=tier, is_wished=is_wished),))
    following_plan = follower(shelf)
    await following_plan.follow(plan)
    for waited_s in (following._PATIENCE_S - 5.0, 10.0):
        assert shelf.brought == []
        following_plan._since_s = {item: since_s - waited_s for item, since_s in following_plan._since_s.items()}
        await following_plan.follow(plan)
        await rest()
    assert shelf.brought == [("a", tier)]
    assert CONFIG.order_s > following._PATIENCE_S, "or orders would lapse while they wait"


async def test_where_memory_is_not_the_devices_it_is_filled_beside_requests() -> None:
    shelf = Shelf(is_idle=False)
    shelf.gate.set()
    plan = CachePlan(orders=(order("a"), order("h", tier=Tier.HOST), order("d", tier=Tier.DISK)))
    following_plan = follower(shelf, is_apart=True)
    for _ in range(4):
        await following_plan.follow(plan)
        await rest()
    assert shelf.brought == [("h", Tier.HOST), ("d", Tier.DISK)]


async def test_what_failed_beside_requests_waits_for_them_again() -> None:
    shelf = Shelf(is_idle=False, is_full=True)
    following_plan, plan = follower(shelf), CachePlan(orders=(order("a"),))
    following_plan._since_s = dict.fromkeys(plan.orders, time.monotonic() - following._PATIENCE_S - 1)
    for _ in range(2):
        await following_plan.follow(plan)
        await rest()
        following_plan._retry_s = dict.fromkeys(plan.orders, 0.0)
    assert len(shelf.brought) == 1


async def test_what_failed_is_tried_again_later_and_others_go_first() -> None:
    shelf = Shelf(is_full=True)
    following_plan, plan = follower(shelf), CachePlan(orders=(order("a"), order("b")))
    for _ in range(4):
        await following_plan.follow(plan)
        await rest()
    assert [name for name, _ in shelf.brought] == ["a", "b"]
    following_plan._retry_s = dict.fromkeys(plan.orders, 0.0)
    await following_plan.follow(plan)
    await rest()
    assert [name for name, _ in shelf.brought] == ["a", "b", "a"]


async def test_why_an_order_failed_is_said_until_it_is_done_or_lapses() -> None:
    shelf, said = Shelf(is_full=True), list[Mapping[str, Residence]]()

    async def say(residences: Mapping[str, Residence]) -> None:
        said.append(residences)

    following_plan, plan = follower(shelf), CachePlan(orders=(order("a"), order("b")))
    reporter = CopyReporter(shelf, list, say, tells_disk=True, problems=lambda: following_plan.problems)
    for _ in range(4):
        await following_plan.follow(plan)
        await rest()
    shelf.held["b"] = Copy(disk_bytes=1)
    await reporter.report()
    assert {name: residence.problem for name, residence in said[-1].items()} == {
        name: f"DEVICE_FULL: {DeviceFull(name, '5').message}" for name in ("a", "b")
    }
    assert said[-1]["b"].disk_bytes == 1
    shelf.is_full = False
    shelf.gate.set()
    following_plan._retry_s = {}
    await following_plan.follow(replace(plan, orders=plan.orders[:1]))
    await rest()
    await reporter.report()
    assert said[-1] == {"a": Residence(device_bytes=1), "b": Residence(disk_bytes=1)}


async def test_a_release_waits_for_requests_and_is_done_once() -> None:
    shelf = Shelf(held={"a": Copy(device_bytes=1)}, in_use={"a"})
    plan = CachePlan(releases=(Release(replica_id="r", model_id="a", until_s=time.time() + 60),))
    following_plan = follower(shelf)
    await following_plan.follow(plan)
    assert "a" in shelf.held
    shelf.in_use.clear()
    await following_plan.follow(plan)
    assert "a" not in shelf.held
    shelf.held["a"] = Copy(device_bytes=1)  # a request has brought it back
    await following_plan.follow(plan)
    assert "a" in shelf.held


async def test_pins_are_those_of_the_plan() -> None:
    shelf = Shelf()
    pinned = (Pinned(replica_id="r", model_id="a"), Pinned(replica_id="s", model_id="b"))
    await follower(shelf).follow(CachePlan(pinned=pinned))
    assert shelf.kept == {"a"}
    await follower(shelf).follow(CachePlan())
    assert shelf.kept == frozenset()


async def test_a_plans_rates_are_passed_on_and_count_no_longer_than_it_is_published() -> None:
    shelf, elsewhere = Shelf(), {"a": (1, 0, 0)}
    stages = {"denoiser": StageOutlook(rate=0.5, run_s=2.0), "vae": StageOutlook(rate=9.0, run_s=9.0)}
    plan = CachePlan(term=1, version=1, outlooks=(Outlook(model_id="a", band=Band.HOT, stages=stages),))
    following_plan = PlanFollower("r", "denoiser", shelf, PlanView(MemoryRegistry()), lambda: elsewhere)
    for _ in range(3):
        await following_plan.follow(plan)
    assert shelf.told == [({"a": Asked(rate=0.5, run_s=2.0, others=(1, 0, 0))}, following._FRESH_S)]
    elsewhere["a"] = (2, 0, 0)
    following_plan._told_s -= following._TELL_INTERVAL_S
    following_plan._seen_s -= 20.0
    await following_plan.follow(plan)
    asked, fresh_s = shelf.told[-1]
    assert asked["a"].others == (2, 0, 0)
    assert fresh_s == pytest.approx(following._FRESH_S - 20.0, abs=1.0)
    await following_plan.follow(replace(plan, version=2))
    assert [fresh_s for _, fresh_s in shelf.told[2:]] == [following._FRESH_S]
    assert 3 * CONFIG.repeat_s <= following._FRESH_S


async def test_a_reporter_says_what_changed_and_nothing_twice() -> None:
    shelf, said = Shelf(), list[Mapping[str, Residence]]()

    async def say(residences: Mapping[str, Residence]) -> None:
        said.append(residences)

    reporter = CopyReporter(shelf, list, say, tells_disk=False)
    await reporter.report()
    assert said == []
    shelf.held = {"a": Copy(device_bytes=5, host_bytes=6, disk_bytes=7, load_s=0.12345), "d": Copy(disk_bytes=1)}
    await reporter.changed(["a"])
    await reporter.report()
    assert said == [{"a": Residence(device_bytes=5, host_bytes=6, load_s=0.123)}]
    shelf.held = {}
    await reporter.changed([])
    assert said[-1] == {"a": Residence(host_bytes=6, load_s=0.123)}, "the disk and memory were not looked at"
    await reporter.report()
    assert said[-1] == {}
    shelf.held = {"d": Copy(disk_bytes=1)}
    remote = CopyReporter(shelf, list, say, tells_disk=True)
    await remote.report()
    assert said[-1] == {"d": Residence(disk_bytes=1)}


async def test_a_follower_follows_its_view() -> None:
    shelf, registry = Shelf(), MemoryRegistry()
    shelf.gate.set()
    plans = PlanView(registry)
    plans.plan = CachePlan(term=1, orders=(order("a"),))
    work = asyncio.create_task(PlanFollower("r", "denoiser", shelf, plans).run())
    await until(lambda: "a" in shelf.held)
    work.cancel()
    await asyncio.gather(work, return_exceptions=True)
