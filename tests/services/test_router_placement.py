"""Where the router sends a node, by what replicas announce. Stages only note who was called."""

import asyncio
from collections.abc import AsyncIterator, Coroutine, Mapping
from dataclasses import replace
from typing import Any

import pytest

from darkroom.errors import StoreUnavailable
from darkroom.registry.catalogue import ComponentEntry, publish_catalogue
from darkroom.registry.membership import ClusterView, Registration
from darkroom.registry.memory import MemoryRegistry
from darkroom.registry.port import Member, Rooms
from darkroom.registry.residence import LOADED, Residence
from darkroom.wire.graphs import EncodeTextWork, Node, make_graph
from services.router.attempts import Attempts
from services.router.calls import CallSettings, Preparation
from services.router.running import GraphRunner
from services.router.values import Answer, Embedding, Value
from tests.registry.entries import make_entry
from tests.services.neighbours import eventually
from tests.services.routing import within

GIGABYTE = 10**9
ON_DEVICE = Residence(device_bytes=GIGABYTE)
IN_MEMORY = Residence(host_bytes=GIGABYTE, disk_bytes=GIGABYTE)
ON_DISK = Residence(disk_bytes=GIGABYTE)
FETCHES = Rooms(device_bytes=100 * GIGABYTE, host_bytes=0, disk_bytes=100 * GIGABYTE, evicts=False)
"""Of a replica whose models come from afar."""


class Called:
    """Stages that answer as soon as they may, which is at once unless told otherwise."""

    def __init__(self) -> None:
        self.by_address: dict[str, str] = {}
        self.names: list[str] = []
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.without_store: set[str] = set()
        """Those that cannot fetch anything."""
        self.store_hangs = False
        """Or else it refuses at once."""

    async def call(
        self, address: str, node: Node, inputs: Mapping[str, Value], settings: CallSettings, attempts: Attempts
    ) -> Answer:
        del inputs, settings
        self.names.append(self.by_address[address])
        await self.may_answer.wait()
        if self.names[-1] in self.without_store:
            attempts.begun_s -= 10.0 * self.store_hangs
            raise StoreUnavailable(node.work.model_id, "it does not answer")
        return Answer(Embedding({}), 1.0)

    async def prepare(self, address: str, node: Node, settings: CallSettings) -> Preparation:
        del address, node, settings
        raise AssertionError("graphs of one node need no hint")


class Encoders:
    """Encoder replicas that announce themselves, and a router that sees them."""

    def __init__(self) -> None:
        self.called = Called()
        self._registry = MemoryRegistry()
        self._view = ClusterView(self._registry)
        self._runner = GraphRunner(self._view, self.called, replica_wait_s=1.0, max_running=100)
        self._registrations: dict[str, Registration] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._start(self._view.run())

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        self._tasks.append(asyncio.create_task(work))
        return self._tasks[-1]

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def know(self, *model_ids: str) -> None:
        """Puts models into the catalogue, all of one size."""
        parts = (ComponentEntry(name="text_encoder", size_bytes=GIGABYTE),)
        await publish_catalogue(self._registry, [replace(make_entry(name), components=parts) for name in model_ids])
        await eventually(lambda: len(self._view.models()) == len(model_ids))

    async def start(
        self, name: str, has: Mapping[str, Residence], rooms: Rooms | None = FETCHES, machine: str = ""
    ) -> None:
        """A replica that has models somewhere, on a machine of its own unless told otherwise."""
        address = f"{machine or name}:{len(self._registrations) + 1}"
        member = Member(replica_id=name, stage="encoder", address=address, rooms=rooms)
        self.called.by_address[address] = name
        self._registrations[name] = Registration(self._registry, member)
        self._start(self._registrations[name].run())
        await eventually(lambda: member in self._view.members())
        await self.say(name, has)

    async def say(self, name: str, has: Mapping[str, Residence]) -> None:
        """What it has changes."""
        await self._registrations[name].set_residences(has)
        await eventually(lambda: self._view.residences_of(name) == dict(has))

    async def ask(self, model_id: str) -> str:
        """Sends a request and waits for its answer. Returns who ran it."""
        await self._run(model_id)
        return self.called.names[-1]

    async def begin(self, model_id: str) -> str:
        """Sends a request that waits for its answer. Returns who runs it."""
        self.called.may_answer.clear()
        count = len(self.called.names)
        self._start(self._run(model_id))
        await eventually(lambda: len(self.called.names) > count)
        return self.called.names[-1]

    async def _run(self, model_id: str) -> None:
        work = EncodeTextWork(model_id=model_id, prompt="a ring", negative_prompt="", guided=True)
        assert [event async for event in self._runner.run(make_graph({"encode": (work, {})}), within(10.0))]


@pytest.fixture
async def encoders() -> AsyncIterator[Encoders]:
    started = Encoders()
    await started.know("flux", "sd", "turbo")
    yield started
    await started.close()


async def test_a_replica_with_the_model_on_its_disk_comes_before_one_that_must_fetch_it(encoders: Encoders) -> None:
    await encoders.start("a", {})
    await encoders.start("b", {"sd": ON_DISK})
    assert await encoders.ask("sd") == "b"


async def test_a_store_that_hangs_is_waited_for_once_by_each_machine_and_one_that_refuses_is_asked_by_all(
    encoders: Encoders,
) -> None:
    for name, machine in (("a", "one"), ("b", "one"), ("c", "two"), ("d", "two")):
        await encoders.start(name, {}, machine=machine)
    encoders.called.without_store = {"a", "b", "c", "d"}
    with pytest.raises(StoreUnavailable):
        await encoders.ask("sd")
    assert sorted(encoders.called.names) == ["a", "b", "c", "d"]
    encoders.called.names.clear()
    encoders.called.store_hangs = True
    with pytest.raises(StoreUnavailable):
        await encoders.ask("sd")
    assert sorted(name in ("a", "b") for name in encoders.called.names) == [False, True]
    encoders.called.names.clear()
    encoders.called.without_store = {"a", "b"}
    assert await encoders.ask("sd") in {"c", "d"}
    assert len(encoders.called.names) <= 2


async def test_a_replica_with_the_whole_store_on_its_disk_has_every_model_there(encoders: Encoders) -> None:
    await encoders.start("a", {})
    await encoders.start("b", {}, Rooms(device_bytes=GIGABYTE, host_bytes=0, disk_bytes=None, evicts=False))
    assert await encoders.ask("sd") == "b"


async def test_a_replica_with_the_model_in_memory_comes_before_one_with_it_on_disk(encoders: Encoders) -> None:
    await encoders.start("a", {"sd": ON_DISK})
    await encoders.start("b", {"sd": IN_MEMORY})
    assert await encoders.ask("sd") == "b"


async def test_a_replica_with_the_model_on_its_device_comes_before_one_with_it_in_memory(encoders: Encoders) -> None:
    await encoders.start("a", {"sd": IN_MEMORY})
    await encoders.start("b", {"sd": ON_DEVICE})
    assert await encoders.ask("sd") == "b"


async def test_a_load_that_runs_is_joined_before_another_one_is_begun(encoders: Encoders) -> None:
    await encoders.start("b", {})
    assert await encoders.begin("sd") == "b"
    await encoders.start("a", {})
    assert await encoders.begin("sd") == "b"
    assert await encoders.begin("flux") == "a", "which nobody loads"


async def test_a_load_counts_until_its_request_is_answered(encoders: Encoders) -> None:
    await encoders.start("b", {})
    await encoders.begin("sd")
    await encoders.start("a", {})
    encoders.called.may_answer.set()
    await eventually(lambda: not encoders._runner.running)
    assert await encoders.ask("sd") == "a", "b says nowhere that it has the model, so equals are told apart by id"


async def test_replicas_that_say_nothing_of_tiers_are_told_apart_by_their_devices_alone(encoders: Encoders) -> None:
    await encoders.start("a", {}, None)
    await encoders.start("b", {"sd": LOADED}, None)
    assert await encoders.ask("sd") == "b"
    assert await encoders.ask("flux") == "a"


ONE = Rooms(device_bytes=GIGABYTE, host_bytes=0, disk_bytes=None, evicts=True)
TWO = Rooms(device_bytes=2 * GIGABYTE, host_bytes=0, disk_bytes=None, evicts=True)
"""Of replicas that hold so many models at once."""


async def test_what_is_asked_for_is_not_pushed_out_where_another_replica_has_room(encoders: Encoders) -> None:
    await encoders.start("a", {"sd": ON_DEVICE}, ONE)
    await encoders.start("b", {"turbo": ON_DEVICE}, TWO)
    for _ in range(5):
        assert await encoders.ask("sd") == "a"
    assert await encoders.ask("flux") == "b"


async def test_what_nobody_asks_for_may_be_pushed_out(encoders: Encoders) -> None:
    await encoders.start("a", {"sd": ON_DEVICE}, ONE)
    await encoders.start("b", {"turbo": ON_DEVICE}, TWO)
    assert await encoders.ask("flux") == "a"
