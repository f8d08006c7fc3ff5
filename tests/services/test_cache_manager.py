"""Cache managers over gRPC: one plans, all answer, usage counts once, and the next leader goes on where one fell."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from darkroom.errors import Deposed, InvalidField, ModelNotFound, QueueFull
from darkroom.policy.planning import Wish
from darkroom.registry import keys
from darkroom.registry.cache_plan import parse_plan, wish_json
from darkroom.registry.residence import Residence
from darkroom.v1 import cachemgr_pb2, stage_pb2
from darkroom.wire.status import from_rpc_error
from darkroom.wire.usage import UsageReport
from services.cachemgr.situation import START_S
from tests.registry.following import until
from tests.services.managers import Managers, RunningManager

NONE: Any = 9
"""Of no enum."""


@pytest.fixture
async def managers() -> AsyncIterator[Managers]:
    async with Managers() as started:
        yield started


async def plan_of(managers: Managers) -> cachemgr_pb2.Plan:
    """The plan that stands in the registry, by its orders."""
    value = (await managers.registry.read(keys.PLAN)).get(keys.PLAN, b"")
    plan = parse_plan(value) if value else None
    orders = [(o.replica_id, o.model_id, o.is_done) for o in plan.orders] if plan else []
    return cachemgr_pb2.Plan(
        term=plan.term if plan else 0,
        version=plan.version if plan else 0,
        orders=[cachemgr_pb2.Order(replica_id=r, model_id=m, done=d) for r, m, d in orders],
    )


async def ordered(managers: Managers, replica_id: str, model_id: str, *, within_s: float = 12.0) -> None:
    async with asyncio.timeout(within_s):  # what a copy is worth is looked up again after five seconds
        while not any(
            (order.replica_id, order.model_id) == (replica_id, model_id) for order in (await plan_of(managers)).orders
        ):
            await asyncio.sleep(0.02)


async def refused(call: object) -> Exception:
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await call  # type: ignore[misc]
    error = from_rpc_error(failure.value, "cachemgr")
    assert error is not None
    return error


async def leader_and_other(one: RunningManager, two: RunningManager) -> tuple[RunningManager, RunningManager]:
    await until(lambda: bool(one.manager.leader_id and one.manager.leader_id == two.manager.leader_id))
    return (one, two) if one.manager.leader_id == one.manager.manager_id else (two, one)


async def test_a_report_counts_once_however_often_it_is_sent(managers: Managers) -> None:
    manager = await managers.manager()
    assert await manager.report(1, sd=10)
    before = (await manager.describe()).popularities[0].rate
    assert not await manager.report(1, sd=10)
    assert (await manager.describe()).popularities[0].rate == pytest.approx(before, rel=0.01)
    assert await manager.report(2, sd=10)
    assert not await manager.report(1, sd=10)
    assert (await manager.describe()).popularities[0].rate == pytest.approx(2 * before, rel=0.02)
    assert await manager.report(1, reporter_id="router-2", sd=20)
    assert (await manager.describe()).popularities[0].rate == pytest.approx(4 * before, rel=0.02)


async def test_who_is_busy_is_what_the_newest_report_says(managers: Managers) -> None:
    ledger = (await managers.manager()).manager.ledger
    for sequence, count in ((1, 1), (2, 0), (1, 1)):
        loads = (("denoiser-1", count),)
        ledger.add(UsageReport(reporter_id="router-1", sequence=sequence, usages=(), loads=loads), 0.0)
    assert ledger.busy_ids(1.0) == frozenset()


async def test_what_is_in_no_catalogue_is_not_counted(managers: Managers) -> None:
    manager = await managers.manager()
    assert await manager.report(1, made_up=10)
    assert not (await manager.describe()).popularities


async def test_a_busy_model_is_ordered_where_it_is_not(managers: Managers) -> None:
    await managers.replica("denoiser-1", "sd")
    await managers.replica("denoiser-2")
    manager = await managers.manager()
    await manager.report(1, sd=2000)
    await ordered(managers, "denoiser-2", "sd")
    described = await manager.describe()
    assert described.popularities[0].band == cachemgr_pb2.BAND_HOT
    site = described.popularities[0].sites[0]
    assert (site.stage, site.replica_id) == (stage_pb2.STAGE_DENOISER, "denoiser-2")
    assert site.warm_duration.ToSeconds() == 8
    assert [o.reason.startswith("saves") for o in described.plan.orders] == [True]


async def test_a_machine_that_runs_other_stages_is_a_place_for_a_new_replica(managers: Managers) -> None:
    await managers.replica("denoiser-1", disk_bytes=1 << 40)
    await managers.replica("encoder-1", machine="10.0.0.2")
    await managers.replica("encoder-2", machine="10.0.0.0", device="cuda:0")
    manager = await managers.manager()
    await manager.report(1, sd=2000)
    sites = [
        (site.machine, site.warm_duration.ToSeconds() > START_S)
        for site in (await manager.describe()).popularities[0].sites
        if site.stage == stage_pb2.STAGE_DENOISER and not site.replica_id
    ]
    assert sites == [("10.0.0.2", True)], "its disk has every model, that of the other machine none"


async def test_every_manager_answers_and_knows_what_the_leader_knows(managers: Managers) -> None:
    await managers.replica("denoiser-1", "sd")
    await managers.replica("denoiser-2")
    leader, other = await leader_and_other(await managers.manager(), await managers.manager())
    for manager in (leader, other):
        assert await manager.report(1, sd=2000)
    await ordered(managers, "denoiser-2", "sd")
    plans = []
    for manager in (leader, other):
        call = manager.stub.WatchPlan(cachemgr_pb2.WatchPlanRequest(), timeout=5)
        async for answer in call:
            if answer.plan.orders:
                plans.append(answer.plan.orders[0])
                break
        call.cancel()
    assert plans[0] == plans[1]
    answers = [await manager.describe() for manager in (leader, other)]
    assert answers[0].leader_id == answers[1].leader_id == leader.manager.manager_id
    assert [answer.manager_id for answer in answers] == [leader.manager.manager_id, other.manager.manager_id]
    assert len(answers[1].replicas) == 2
    assert answers[0].popularities[0].rate == pytest.approx(answers[1].popularities[0].rate, rel=0.05)


async def test_the_next_leader_goes_on_with_the_same_plan(managers: Managers) -> None:
    await managers.replica("denoiser-1", "sd")
    await managers.replica("denoiser-2")
    leader, other = await leader_and_other(await managers.manager(), await managers.manager())
    for manager in (leader, other):
        await manager.report(1, sd=2000)
    await ordered(managers, "denoiser-2", "sd")
    before = await plan_of(managers)
    await leader.kill()
    await until(lambda: other.manager.election.leading is not None, within_s=3.0)
    async with asyncio.timeout(3):
        while (after := await plan_of(managers)).term == before.term:
            await asyncio.sleep(0.02)
    assert after.term > before.term
    assert after.version > before.version
    assert list(after.orders) == list(before.orders)


async def test_a_deposed_leader_cannot_write_its_plan(managers: Managers) -> None:
    """As one does that was stopped between looking whether it leads and writing."""
    await managers.replica("denoiser-1", "sd")
    leader, other = await leader_and_other(await managers.manager(), await managers.manager())
    stale = leader.manager.election.leading
    assert stale is not None
    await leader.manager.election.resign()
    await until(lambda: other.manager.election.leading is not None, within_s=3.0)
    async with asyncio.timeout(3):
        while (await plan_of(managers)).term <= stale.term:
            await asyncio.sleep(0.02)
    before = await managers.registry.read(keys.ROOT + "cache/")
    with pytest.raises(Deposed):
        await asyncio.wait_for(leader.manager._controller.plan_once(stale), 3)
    assert parse_plan((await managers.registry.read(keys.PLAN))[keys.PLAN]).term > stale.term
    assert before.keys() == (await managers.registry.read(keys.ROOT + "cache/")).keys()


async def test_popularity_survives_all_managers(managers: Managers) -> None:
    first = await managers.manager()
    await first.report(1, sd=500, flux=5)
    await until(lambda: b"flux" in managers.registry._state.get(keys.POPULARITY, b""))
    known = (await first.describe()).popularities
    await first.kill()
    second = await managers.manager()
    async with asyncio.timeout(5):
        while len((await second.describe()).popularities) < 2:
            await asyncio.sleep(0.02)
    again = (await second.describe()).popularities
    assert [(p.model_id, p.band) for p in again] == [(p.model_id, p.band) for p in known]
    assert again[0].rate == pytest.approx(known[0].rate, rel=0.1)


async def test_without_a_registry_managers_answer_from_what_they_saw(managers: Managers) -> None:
    await managers.replica("denoiser-1", "sd")
    manager = await managers.manager()
    await until(lambda: bool(managers.registry._state.get(keys.PLAN)))
    managers.registry.set_reachable(is_reachable=False)
    described = await manager.describe()
    assert [r.replica_id for r in described.replicas] == ["denoiser-1"]
    assert await manager.report(1, sd=1)
    refusal = await refused(manager.stub.Pin(cachemgr_pb2.PinRequest(model_id="sd"), timeout=5))
    assert type(refusal).__name__ == "RegistryUnavailable"
    await until(lambda: manager.manager.election.leading is None, within_s=3.0)
    managers.registry.set_reachable(is_reachable=True)
    await until(lambda: manager.manager.election.leading is not None, within_s=3.0)


async def test_wishes_to_any_manager_are_granted_and_then_forgotten(managers: Managers) -> None:
    await managers.replica("denoiser-1")
    holder = await managers.replica("denoiser-2", "flux")
    _, other = await leader_and_other(await managers.manager(), await managers.manager())
    wish = cachemgr_pb2.PrefetchRequest(model_id="flux", replica_id="denoiser-1", tier=cachemgr_pb2.TIER_DEVICE)
    await other.stub.Prefetch(wish, timeout=5)
    await ordered(managers, "denoiser-1", "flux")
    await other.stub.Drop(cachemgr_pb2.DropRequest(model_id="flux"), timeout=5)
    async with asyncio.timeout(5):
        while len((await other.describe()).plan.releases) < 2:
            await asyncio.sleep(0.02)
    await until(lambda: not any(key.startswith(keys.WISHES) for key in managers.registry._state))
    await holder.set_residences({"flux": Residence(disk_bytes=1)})
    described = await other.describe()
    assert [r.replica_id for r in described.plan.releases] == ["denoiser-1", "denoiser-2"]
    assert not [order for order in described.plan.orders if order.model_id == "flux"]


async def test_what_a_replica_could_not_bring_is_described_and_is_not_taken_for_a_copy(managers: Managers) -> None:
    broken = await managers.replica("denoiser-1")
    manager = await managers.manager()
    await broken.set_residences({"flux": Residence(problem="DEVICE_FULL: no room")})
    async with asyncio.timeout(5):
        while not (residences := (await manager.describe()).replicas[0].residences):
            await asyncio.sleep(0.02)
    assert residences[0].problem == "DEVICE_FULL: no room"
    assert not residences[0].HasField("device_bytes")
    request = cachemgr_pb2.LocateRequest(model_id="flux", stage=stage_pb2.STAGE_DENOISER)
    assert (await manager.stub.Locate(request, timeout=5)).holder_count == 0


async def test_a_pin_stands_until_it_is_ended(managers: Managers) -> None:
    await managers.replica("denoiser-1", "sd")
    await managers.replica("denoiser-2")
    manager = await managers.manager()
    await manager.stub.Pin(cachemgr_pb2.PinRequest(model_id="sd", copy_count=1), timeout=5)
    async with asyncio.timeout(5):
        while not (described := await manager.describe()).plan.keeps:
            await asyncio.sleep(0.02)
    assert [(keep.replica_id, keep.model_id) for keep in described.plan.keeps] == [("denoiser-1", "sd")]
    assert [(pin.model_id, pin.copy_count) for pin in described.pins] == [("sd", 1)]
    assert managers.kept == ["sd"]
    await manager.stub.Pin(cachemgr_pb2.PinRequest(model_id="sd", unpin=True), timeout=5)
    async with asyncio.timeout(5):
        while (await manager.describe()).plan.keeps:
            await asyncio.sleep(0.02)
    assert managers.kept == []


async def test_a_plan_that_does_not_change_is_published_again_now_and_then(managers: Managers) -> None:
    """So that replicas know its rates to count still; and not with every look at the cluster."""
    await managers.replica("denoiser-1", "sd")
    manager = await managers.manager()
    controller = manager.manager._controller
    async with asyncio.timeout(5):
        while not (before := await plan_of(managers)).version:
            await asyncio.sleep(0.02)
    await asyncio.sleep(0.5)
    assert await plan_of(managers) == before
    controller._published_s -= controller._config.repeat_s
    async with asyncio.timeout(5):
        while (after := await plan_of(managers)).version == before.version:
            await asyncio.sleep(0.02)
    assert after.version == before.version + 1


async def test_a_damaged_plan_is_replaced_by_one_that_followers_take(managers: Managers) -> None:
    await managers.replica("denoiser-1", "sd")
    manager = await managers.manager()
    async with asyncio.timeout(5):
        while not (before := await plan_of(managers)).version:
            await asyncio.sleep(0.02)
    await managers.registry.put(keys.PLAN, b"damaged")
    async with asyncio.timeout(5):
        while (await manager.describe()).plan.version <= before.version:
            await asyncio.sleep(0.02)


async def test_wishes_that_cannot_be_are_refused_by_name(managers: Managers) -> None:
    manager = await managers.manager()
    stub = manager.stub
    for call, field in [
        (stub.Prefetch(cachemgr_pb2.PrefetchRequest(), timeout=5), "model_id"),
        (stub.Prefetch(cachemgr_pb2.PrefetchRequest(model_id="sd", copy_count=-1), timeout=5), "copy_count"),
        (stub.Prefetch(cachemgr_pb2.PrefetchRequest(model_id="sd", copy_count=1001), timeout=5), "copy_count"),
        (stub.Prefetch(cachemgr_pb2.PrefetchRequest(model_id="sd", tier=NONE), timeout=5), "tier"),
        (stub.Prefetch(cachemgr_pb2.PrefetchRequest(model_id="sd", stage=NONE), timeout=5), "stage"),
        (stub.Prefetch(cachemgr_pb2.PrefetchRequest(model_id="sd", replica_id="/"), timeout=5), "replica_id"),
        (stub.Drop(cachemgr_pb2.DropRequest(model_id="sd", stage=NONE), timeout=5), "stage"),
        (stub.Pin(cachemgr_pb2.PinRequest(model_id="sd", copy_count=-1), timeout=5), "copy_count"),
        (stub.ReportUsage(cachemgr_pb2.ReportUsageRequest(), timeout=5), "reporter_id"),
    ]:
        error = await refused(call)
        assert isinstance(error, InvalidField)
        assert error.facts["field"] == field
    for call in (
        stub.Prefetch(cachemgr_pb2.PrefetchRequest(model_id="nobody"), timeout=5),
        stub.Drop(cachemgr_pb2.DropRequest(model_id="nobody"), timeout=5),
        stub.Pin(cachemgr_pb2.PinRequest(model_id="nobody"), timeout=5),
    ):
        assert isinstance(await refused(call), ModelNotFound)


async def test_wishes_are_bounded(managers: Managers) -> None:
    manager = await managers.manager()
    for number in range(256):  # no replica is up to grant them
        waiting = Wish(model_id="sd", until_s=time.time() + 600)
        await managers.registry.put(keys.wish(f"w{number}"), wish_json(waiting))
        await managers.registry.put(keys.pin(f"m{number}"), b"{}")
    for call in (
        manager.stub.Pin(cachemgr_pb2.PinRequest(model_id="sd"), timeout=5),
        manager.stub.Prefetch(cachemgr_pb2.PrefetchRequest(model_id="sd"), timeout=5),
    ):
        assert isinstance(await refused(call), QueueFull)


async def test_a_wish_waits_for_a_replica_that_can_grant_it(managers: Managers) -> None:
    await managers.replica("vae-1")
    manager = await managers.manager()
    wish = cachemgr_pb2.PrefetchRequest(model_id="sd", stage=stage_pb2.STAGE_DENOISER)
    await manager.stub.Prefetch(wish, timeout=5)
    await asyncio.sleep(0.5)
    assert any(key.startswith(keys.WISHES) for key in managers.registry._state)
    await managers.replica("denoiser-1")
    await ordered(managers, "denoiser-1", "sd")
    await until(lambda: not any(key.startswith(keys.WISHES) for key in managers.registry._state))
