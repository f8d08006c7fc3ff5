"""Of several candidates one leads, the next takes over within the lease, and who was deposed writes nothing."""

import asyncio
from contextlib import AsyncExitStack

import pytest

from darkroom.errors import Deposed
from darkroom.registry import keys
from darkroom.registry.catalogue import publish_catalogue
from darkroom.registry.election import Election
from darkroom.registry.etcd import EtcdRegistry
from darkroom.registry.memory import MemoryRegistry
from darkroom.registry.port import Claim, Guard, LeaseId, Registry, Revision
from tests.registry.entries import make_entry
from tests.registry.etcd_process import EtcdProcess
from tests.registry.following import running, until

OFFICE = keys.ELECTION


def candidate(registry: Registry, name: str, *, ttl_s: int = 2) -> Election:
    return Election(registry, OFFICE, name, ttl_s=ttl_s)


async def test_a_key_is_claimed_once_and_says_who_was_first(registry: Registry) -> None:
    lease, other = await registry.grant(10), await registry.grant(10)
    first = await registry.claim(OFFICE, b"a", lease=lease)
    assert first == await registry.claim(OFFICE, b"a", lease=lease) == await registry.claim(OFFICE, b"b", lease=other)
    assert first.value == b"a"
    await registry.revoke(lease)
    second = await registry.claim(OFFICE, b"b", lease=other)
    assert (second.value, second.created > first.created) == (b"b", True)


async def test_a_guarded_write_needs_the_very_key_it_names(registry: Registry) -> None:
    lease = await registry.grant(10)
    old = Guard(key=OFFICE, created=(await registry.claim(OFFICE, b"a", lease=lease)).created)
    await registry.put("/a/1", b"one", guard=old)
    await registry.revoke(lease)
    for _ in range(2):  # while nobody leads, and while another does
        with pytest.raises(Deposed):
            await registry.put("/a/1", b"two", guard=old)
        with pytest.raises(Deposed):
            await registry.delete("/a/1", guard=old)
        await registry.claim(OFFICE, b"b", lease=await registry.grant(10))
    assert await registry.read("/a/") == {"/a/1": b"one"}
    with pytest.raises(Deposed):
        await registry.put("/a/1", b"two", guard=Guard(key="/never/created", created=Revision(1)))


async def test_writing_a_key_again_does_not_make_it_another(registry: Registry) -> None:
    await registry.put("/a/1", b"one")
    created = (await registry.claim("/a/1", b"x", lease=await registry.grant(10))).created
    await registry.put("/a/1", b"two")
    await registry.put("/a/2", b"guarded", guard=Guard(key="/a/1", created=created))
    await registry.delete("/a/2", guard=Guard(key="/a/1", created=created))
    assert await registry.read("/a/") == {"/a/1": b"two"}


async def test_one_of_three_leads_and_all_know_who(registry: Registry) -> None:
    elections = [candidate(registry, name) for name in ("a", "b", "c")]
    async with AsyncExitStack() as stack:
        for election in elections:
            await stack.enter_async_context(running(election.run()))
        await until(lambda: all(election.leader_id for election in elections))
        await asyncio.sleep(2.5)  # longer than a lease that nobody keeps alive
        leading = [election for election in elections if election.leading]
        assert len(leading) == 1
        assert {election.leader_id for election in elections} == {leading[0]._id}


async def test_a_leader_that_resigns_is_followed_at_once_in_a_higher_term(registry: Registry) -> None:
    first, second = candidate(registry, "a"), candidate(registry, "b")
    async with running(first.run()):
        await until(lambda: first.leading is not None)
        async with running(second.run()):
            await until(lambda: second.leader_id == "a")
            before = first.leading
            await first.resign()
            assert first.leading is None
            await until(lambda: second.leading is not None, within_s=1.0)
            assert before
            assert second.leading
            assert second.leading.term > before.term


class Slow(MemoryRegistry):
    """Grants a claim long before it says so."""

    def __init__(self) -> None:
        super().__init__()
        self.answers = asyncio.Event()

    async def claim(self, key: str, value: bytes, *, lease: LeaseId) -> Claim:
        found = await super().claim(key, value, lease=lease)
        await self.answers.wait()
        return found


async def test_who_resigns_while_being_elected_never_leads() -> None:
    registry = Slow()
    election = candidate(registry, "a")
    async with running(election.run()):
        await until(lambda: OFFICE in registry._state)
        resigning = asyncio.create_task(election.resign())
        await asyncio.sleep(0)
        registry.answers.set()
        await resigning
        assert election.leading is None
        assert OFFICE not in await registry.read(keys.ROOT)


async def test_a_dead_leader_is_followed_within_its_lease(registry: Registry) -> None:
    first, second = candidate(registry, "a"), candidate(registry, "b")
    async with AsyncExitStack() as dying:
        await dying.enter_async_context(running(first.run()))
        await until(lambda: first.leading is not None)
        async with running(second.run()):
            await until(lambda: second.leader_id == "a")
            await dying.aclose()  # without a word: nobody keeps its lease alive
            await until(lambda: second.leading is not None, within_s=4.0)
            assert first.leading is None


async def test_a_leader_cut_off_steps_down_by_itself_before_another_can_lead() -> None:
    registry = MemoryRegistry()
    election = candidate(registry, "a")
    async with running(election.run()):
        await until(lambda: election.leading is not None)
        fenced = election.leading
        assert fenced
        registry.set_reachable(is_reachable=False)
        await until(lambda: election.leading is None, within_s=2.5)
        registry.set_reachable(is_reachable=True)
        assert (await asyncio.wait_for(election.elected(), 5)).term > fenced.term
        with pytest.raises(Deposed):
            await fenced.put(keys.PLAN, b"of the old term")
        assert keys.PLAN not in await registry.read(keys.ROOT)


async def test_a_deposed_leader_cannot_write_the_catalogue(registry: Registry) -> None:
    election = candidate(registry, "a")
    async with running(election.run()):
        await until(lambda: election.leading is not None)
        fenced = election.leading
        assert fenced
        await publish_catalogue(fenced, [make_entry("sd")])
        await election.resign()
        with pytest.raises(Deposed):
            await publish_catalogue(fenced, [make_entry("flux")])
    assert list(await registry.read(keys.MODELS)) == [keys.model("sd")]


async def test_a_leader_stays_one_through_a_short_restart_of_etcd(
    etcd: EtcdProcess, etcd_registry: EtcdRegistry
) -> None:
    election = candidate(etcd_registry, "a", ttl_s=5)
    async with running(election.run()):
        await until(lambda: election.leading is not None)
        before = election.leading
        assert before
        etcd.stop()
        etcd.start()
        await asyncio.sleep(1.5)
        await until(lambda: election.leading is not None)
        await before.put(keys.PLAN, b"{}")
