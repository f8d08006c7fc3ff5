"""The bandit by the hour in the cache manager: what an hour taught is brought near before it is asked for.

The clock is the test's: a day passes as fast as plans are made.
"""

import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace

import pytest

from darkroom.errors import Deposed
from darkroom.policy.cacheplan import CachePlan
from darkroom.policy.habits import Memory, Play
from darkroom.policy.prefetch import BanditConfig
from darkroom.policy.worth import Tier
from darkroom.registry import keys
from darkroom.registry.catalogue import publish_catalogue
from darkroom.registry.membership import ClusterView, Registration
from darkroom.registry.memory import MemoryRegistry
from darkroom.registry.port import Member, Rooms
from darkroom.registry.residence import Residence
from darkroom.wire.usage import Usage, UsageReport
from services.cachemgr.config import CacheManagerConfig
from services.cachemgr.hours import habits_json, parse_habits
from services.cachemgr.manager import CacheManager
from tests.registry.entries import make_entry
from tests.registry.following import running, until

MODELS = ("busy", "nine", *(f"rare-{number}" for number in range(6)))
MODEL_BYTES = 8 << 30
HOUR_S, DAY_S = 3600.0, 86_400.0
CONFIG = BanditConfig(exploration_share=0.1)


class World:
    """Two denoisers that do at once what the plan says, and cache managers that plan when the test says so."""

    def __init__(self, closing: AsyncExitStack) -> None:
        self.now_s = 20_000 * DAY_S
        self.registry, self.managers = MemoryRegistry(), list[CacheManager]()
        self._closing, self._sequence = closing, 0
        self._view = ClusterView(self.registry)
        self._replicas: dict[str, Registration] = {}
        self._on_device: dict[str, set[str]] = {}

    async def begin(self) -> None:
        await publish_catalogue(self.registry, [make_entry(name) for name in MODELS])
        await self._closing.enter_async_context(running(self._view.run()))
        for number in (1, 2):
            member = Member(
                replica_id=f"denoiser-{number}",
                stage="denoiser",
                address="10.0.0.1:7000",
                device="cpu",
                rooms=Rooms(device_bytes=5 * MODEL_BYTES, host_bytes=0, disk_bytes=None, evicts=True),
            )
            registration = self._replicas[member.replica_id] = Registration(self.registry, member)
            self._on_device[member.replica_id] = set()
            await self._closing.enter_async_context(running(registration.run()))
        await until(lambda: len(self._view.members("denoiser")) == 2)
        await self._say("denoiser-1", {"busy"})

    async def manager(self, *, hour_prefetch: bool = True) -> CacheManager:
        """One that stands for election; all hear the same reports."""
        config = CacheManagerConfig(model_store=".", hour_prefetch=hour_prefetch)
        manager = CacheManager(
            f"cachemgr-{len(self.managers)}",
            self.registry,
            self._view,
            config,
            clock=lambda: self.now_s,
            on_pins=lambda _pins: None,
        )
        self.managers.append(manager)
        await self._closing.enter_async_context(running(manager.election.run()))
        return manager

    async def _say(self, replica_id: str, names: set[str]) -> None:
        self._on_device[replica_id] = set(names)
        said = {name: Residence(device_bytes=MODEL_BYTES, load_s=8.0) for name in names}
        await self._replicas[replica_id].set_residences(said)
        await until(lambda: self._view.residences_of(replica_id).keys() == names)

    async def plan(self, leader: CacheManager) -> CachePlan:
        """Made, and carried out."""
        leading = await leader.election.elected()
        plan = await leader._controller.plan_once(leading)
        for order in plan.orders:
            if not order.is_done and order.model_id not in self._on_device.get(order.replica_id, {order.model_id}):
                await self._say(order.replica_id, {*self._on_device[order.replica_id], order.model_id})
        return plan

    async def ask(self, name: str, count: int = 1) -> None:
        """Requests go where the model is, or bring it to the first."""
        if not any(name in held for held in self._on_device.values()):
            await self._say("denoiser-1", {*self._on_device["denoiser-1"], name})
        self._sequence += 1
        usage = Usage(stage="denoiser", model_id=name, count=count, run_s=2.0 * count)
        for manager in self.managers:
            report = UsageReport(reporter_id="router-1", sequence=self._sequence, usages=(usage,))
            manager.ledger.add(report, self.now_s)

    async def hour(self, leader: CacheManager, *names: str) -> list[str]:
        """One hour in which models are asked for, and after which only the busy one is left on a device.

        Returns what was brought at its beginning because of the hour.
        """
        start_s = self.now_s
        brought = by_the_hour(await self.plan(leader))
        for at_s, asked in ((20.0, ()), (600.0, names), (620.0, ())):
            self.now_s = start_s + at_s
            for name in asked:
                await self.ask(name)
            await self.plan(leader)
        self.now_s = start_s + HOUR_S
        await self.ask("busy", 20)
        for replica_id, held in list(self._on_device.items()):
            await self._say(replica_id, held & {"busy"})
        return brought

    async def days(self, leader: CacheManager, days: range) -> dict[tuple[int, int], list[str]]:
        """Days on which `nine` is asked for at 9, by day and hour: what was brought because of the hour."""
        found = {}
        for day in days:
            for hour in range(24):
                found[day, hour] = await self.hour(leader, *(("nine",) if hour == 9 else ()))
        return found

    async def learned(self) -> Memory:
        """About denoisers."""
        value = (await self.registry.read(keys.HABITS))[keys.HABITS]
        return parse_habits(CONFIG, value)["denoiser"]


def by_the_hour(plan: CachePlan) -> list[str]:
    return sorted(o.model_id for o in plan.orders if not o.is_done and o.reason.startswith("by the hour"))


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with AsyncExitStack() as closing:
        world = World(closing)
        await world.begin()
        yield world


async def first_requests(world: World) -> None:
    """Makes two of the eight models warm: the first of the rare ones, until `nine` is asked for, and another."""
    for name in MODELS[2:]:
        await world.ask(name)
    await world.ask("busy", 20)


async def test_what_three_days_taught_is_brought_on_the_fourth_and_what_was_in_vain_is_not(world: World) -> None:
    leader = await world.manager()
    await first_requests(world)
    brought = await world.days(leader, range(4))
    assert "nine" in brought[3, 9]
    assert [hour for hour in range(24) if "nine" in brought[3, hour]] == [9]
    assert "rare-0" in brought[0, 15]
    assert not [hour for hour in range(24) if "rare-0" in brought[3, hour]]
    arms = (await world.learned()).arms
    assert arms["nine", 9] == pytest.approx((7.2, 7.2, 7.2))
    assert max(arms["rare-0", 15]) == pytest.approx(-0.8)


async def test_the_next_leader_goes_on_with_what_was_learned_and_with_the_plays_that_run(world: World) -> None:
    leader, other = await world.manager(), await world.manager()
    await first_requests(world)
    await world.days(leader, range(2))
    for _ in range(9):
        await world.hour(leader)
    assert by_the_hour(await world.plan(leader)) == ["nine"]
    await leader.election.resign()
    world.now_s += 20.0
    await world.plan(other)
    world.now_s += 600.0
    await world.ask("nine")
    for wait_s in (10.0, HOUR_S):
        world.now_s += wait_s
        plan = await world.plan(other)
    assert (await world.learned()).arms["nine", 9] == pytest.approx((7.2, 7.2))
    assert plan.term > 1


async def test_it_is_off_by_default(world: World) -> None:
    leader = await world.manager(hour_prefetch=CacheManagerConfig(model_store=".").hour_prefetch)
    await first_requests(world)
    brought = await world.days(leader, range(2))
    assert not any(brought.values())
    assert keys.HABITS not in await world.registry.read(keys.ROOT)


async def test_a_slot_is_played_once_however_often_plans_are_made(world: World) -> None:
    leader = await world.manager()
    await first_requests(world)
    assert await world.hour(leader) == [], "nobody saw it begin"
    first = by_the_hour(await world.plan(leader))
    assert first == ["rare-0", "rare-1"]
    before = await world.learned()
    for wait_s in (5.0, 300.0, 300.0):
        world.now_s += wait_s
        assert by_the_hour(await world.plan(leader)) == []
    after = await world.learned()
    assert [replace(play, arrived_s=None) for play in after.plays] == list(before.plays)


async def test_a_deposed_leader_cannot_write_what_it_learned(world: World) -> None:
    leader, other = await world.manager(), await world.manager()
    await first_requests(world)
    await world.plan(leader)
    stale = await leader.election.elected()
    await leader.election.resign()
    await other.election.elected()
    world.now_s += HOUR_S
    before = await world.registry.read(keys.HABITS)
    with pytest.raises(Deposed):
        await leader._controller.plan_once(stale)
    assert await world.registry.read(keys.HABITS) == before


async def test_damaged_memories_are_replaced(world: World) -> None:
    leader = await world.manager()
    await first_requests(world)
    await world.registry.put(keys.HABITS, b"damaged")
    await world.hour(leader)
    assert await world.hour(leader) == ["rare-0", "rare-1"]
    await world.plan(leader)
    assert (await world.learned()).arms.keys() == {("rare-0", 1), ("rare-1", 1)}


PLAY = Play(
    name="sd", tier=Tier.HOST, node_id="denoiser-1", saved_s=8.0, moved_s=9.0, since_s=3.5, reason="why", arrived_s=4.25
)
MEMORY = Memory(
    slot_number=7,
    plays=(PLAY, replace(PLAY, name="xl", arrived_s=None, is_used=True)),
    arms={("sd", 9): (1.0, -0.5), ("sd", 0): (0.25,)},
)


def test_what_is_written_is_read_and_written_alike() -> None:
    written = habits_json(CONFIG, {"vae": Memory(), "denoiser": MEMORY})
    read = parse_habits(CONFIG, written)
    assert read == {"vae": Memory(), "denoiser": MEMORY}
    assert list(read["denoiser"].arms) == list(MEMORY.arms)
    assert habits_json(CONFIG, read) == written
    assert parse_habits(replace(CONFIG, slot_s=60.0), written) == {}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("plays", [{}]),
        ("plays", 1),
        ("arms", [["sd", 24, 1.0]]),
        ("arms", [["sd", -1, 1.0]]),
        ("arms", [["sd", 0, float("nan")]]),
        ("arms", [["sd"]]),
        ("slot_number", -1),
    ],
)
def test_what_is_no_memory_is_refused(field: str, value: object) -> None:
    fields = json.loads(habits_json(CONFIG, {"denoiser": MEMORY}))
    fields["stages"]["denoiser"][field] = value
    for damaged in (json.dumps(fields).encode(), b"[]", b"\xff", b"[" * 100_000):
        with pytest.raises(ValueError, match="not what was learned"):
            parse_habits(CONFIG, damaged)
