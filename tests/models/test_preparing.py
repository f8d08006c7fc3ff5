"""Hints at a replica: they load what requests then join, and cost those that are here nothing."""

import asyncio
import shutil
import threading
import time
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from darkroom.errors import DeviceFull, Draining, InvalidField, ModelNotFound, QueueFull
from darkroom.models.controlnets import ControlNets
from darkroom.models.loader import Part, part_sizes
from darkroom.models.lone import OnDemand
from darkroom.models.preparing import Preparations
from darkroom.models.program import Ticket
from darkroom.models.replica import StageReplica
from darkroom.models.residency import Asker, Residency
from darkroom.models.store.model_store import model_store
from darkroom.policy.worth import Tier
from darkroom.store.evicting import Eviction
from darkroom.store.opening import open_source
from darkroom.wire.tasks import LoraUse, PrepareTask
from tests.registry.following import until
from tests.tiny.variants import CONTROLNETS
from tests.tiny_models import save_tiny_model

_CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of one size, a ControlNet and a LoRA."""
    root = tmp_path_factory.mktemp("store")
    save_tiny_model(root, "tiny-sd")
    CONTROLNETS["control-sd"]().save_pretrained(root / "control-sd", safe_serialization=True)
    for name in "abc":
        shutil.copytree(root / "tiny-sd", root / name)
    (root / "ink").mkdir()
    save_file({"x": torch.zeros(8)}, root / "ink" / "pytorch_lora_weights.safetensors")
    return root


@asynccontextmanager
async def replica_with_room(store: Path, count: int = 0) -> AsyncIterator[StageReplica]:
    """A denoiser with room for so many models; 0 for any number."""
    eviction = Eviction("lru")
    source = open_source(store, store, 0, eviction=eviction)
    replica = StageReplica(
        replica_id="r",
        stage="denoiser",
        model_store=model_store(source, device="cpu", pool_bytes=0, host_cache_bytes=1 << 30, eviction=eviction),
        device="cpu",
        max_running=1,
        max_batch_rows=8,
        thread_count=1,
        device_budget_bytes=count * sum(part_sizes(store, "a", "denoiser", _CPU).values()),
    )
    yield replica
    replica.close()


def hint(model_id: str, **more: Any) -> PrepareTask:
    return PrepareTask(request_id="r", model_id=model_id, **more)


def held(replica: StageReplica) -> list[str]:
    return [part.model_id for part in replica.state().parts]


async def ask(replica: StageReplica, model_id: str) -> None:
    """A request that runs."""
    async with replica.accepted():
        await replica.part(model_id)
        await replica.run(lambda: None, Ticket(request_id="r"))


async def test_a_hint_loads_and_its_request_joins_the_load(store: Path) -> None:
    loaded: list[Part] = []
    async with replica_with_room(store) as replica:
        load = replica._parts._load

        def noted(model_id: str) -> Part:
            loaded.append(load(model_id))
            return loaded[-1]

        replica._parts._load = noted
        hints = Preparations(replica, replica.part)
        hinted, asked = await asyncio.gather(hints.prepare(hint("a")), replica.part("a"))
        assert loaded == [asked]
        assert not hinted
        assert await hints.prepare(hint("a")), "it was there"
    assert len(loaded) == 1


async def test_a_hint_takes_no_place_among_the_requests(store: Path) -> None:
    async with replica_with_room(store) as replica:
        hints = Preparations(replica, replica.part)
        async with replica.accepted():
            await hints.prepare(hint("a"))
            assert replica.state().running_count == 1
        preparing = asyncio.create_task(hints.prepare(hint("b")))
        await until(lambda: "b" in replica)
        assert replica.state().running_count == 0
        assert not replica.is_idle, "orders of the plan wait for it"
        await ask(replica, "a")
        await preparing
        assert replica.is_idle


async def test_a_hint_pushes_out_what_is_idle_and_nothing_that_a_request_uses(store: Path) -> None:
    async with replica_with_room(store, 1) as replica:
        hints = Preparations(replica, replica.part)
        await ask(replica, "a")
        await hints.prepare(hint("b"))
        assert held(replica) == ["b"]
        async with replica.accepted():
            await replica.part("b")
            with pytest.raises(DeviceFull):
                await asyncio.wait_for(hints.prepare(hint("c")), 8.0)  # a request would wait for ten seconds
            assert held(replica) == ["b"]


async def test_hints_do_not_push_out_what_others_brought_but_requests_do(store: Path) -> None:
    async with replica_with_room(store, 1) as replica:
        hints = Preparations(replica, replica.part)
        await hints.prepare(hint("a"))
        with pytest.raises(DeviceFull):
            await hints.prepare(hint("b"))
        assert held(replica) == ["a"]
        await ask(replica, "b")
        assert held(replica) == ["b"]
        await hints.prepare(hint("c"))
        assert held(replica) == ["c"], "b was asked for by a request, and is idle"


async def test_what_a_hint_brought_is_any_other_model_once_a_request_had_it(store: Path) -> None:
    async with replica_with_room(store, 1) as replica:
        hints = Preparations(replica, replica.part)
        await hints.prepare(hint("a"))
        await ask(replica, "a")
        await hints.prepare(hint("b"))
        assert held(replica) == ["b"]


async def test_an_order_of_the_plan_does_not_push_out_what_a_hint_brought(store: Path) -> None:
    async with replica_with_room(store, 1) as replica:
        await Preparations(replica, replica.part).prepare(hint("a"))
        replica._residency._wait_s = 0.1
        await replica.bring("a", Tier.DEVICE)
        with pytest.raises(DeviceFull):
            await replica.bring("b", Tier.DEVICE)
        assert held(replica) == ["a"]


async def test_what_a_hint_brought_is_any_other_model_once_its_request_is_overdue(store: Path) -> None:
    async with replica_with_room(store, 1) as replica:
        hints = Preparations(replica, replica.part)
        await hints.prepare(hint("a"))
        replica._parts._entries["a"].used_s -= 100.0
        await hints.prepare(hint("b"))
        assert held(replica) == ["b"]


class Slow:
    """Something loaded on demand that takes all the room there is, and is measured when it may be."""

    def __init__(self, residency: Residency) -> None:
        self.may_go_on = threading.Event()
        self.things: OnDemand[str, str] = OnDemand(lambda key: key, measure=self._measure)
        self.things.residency = residency

    def _measure(self, key: str) -> Mapping[str, int]:
        assert self.may_go_on.wait(20.0)
        return {key: 10}


async def test_a_request_that_joins_a_hint_waits_for_room_as_it_would_have_without_it() -> None:
    residency = Residency(10, wait_s=20.0)
    slow, may_leave = Slow(residency), asyncio.Event()

    async def request(key: str, may_end: asyncio.Event | None = None) -> str:
        with residency.holding():
            got = await slow.things.get(key)
            await (may_end.wait() if may_end else asyncio.sleep(0))
            return got

    async def hinted(key: str) -> str:
        with residency.asking(Asker.HINT):
            return await slow.things.get(key)

    slow.may_go_on.set()
    first = asyncio.create_task(request("in the way", may_leave))
    await until(lambda: slow.things.loaded == ("in the way",))
    slow.may_go_on.clear()
    ahead = asyncio.create_task(hinted("wanted"))
    await until(lambda: "wanted" in slow.things)
    asked = asyncio.create_task(request("wanted"))
    await asyncio.sleep(0)
    slow.may_go_on.set()
    await asyncio.sleep(0.2)
    assert not asked.done()
    may_leave.set()
    assert await asked == await ahead == "wanted"
    await first


async def test_a_request_is_not_overdue_while_its_model_is_on_its_way() -> None:
    residency = Residency(10)
    slow = Slow(residency)
    with residency.asking(Asker.HINT):
        coming = asyncio.create_task(slow.things.get("far away"))
    await until(lambda: "far away" in slow.things)
    entry = slow.things._entries["far away"]
    entry.used_s -= 100.0
    slow.may_go_on.set()
    await coming
    assert entry.is_expected(time.monotonic())
    assert not entry.is_expected(time.monotonic() + 100.0)


async def test_a_load_goes_on_when_its_caller_leaves(store: Path) -> None:
    async with replica_with_room(store) as replica:
        hints = Preparations(replica, replica.part)
        leaving = asyncio.create_task(hints.prepare(hint("a")))
        await until(lambda: "a" in replica)
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        await until(lambda: held(replica) == ["a"], within_s=20.0)
        await until(lambda: not hints._loading)


async def test_a_caller_that_leaves_takes_nothing_from_those_with_the_same_hint(store: Path) -> None:
    async with replica_with_room(store) as replica:
        hints = Preparations(replica, replica.part)
        leaving, staying = [asyncio.create_task(hints.prepare(hint("a"))) for _ in range(2)]
        await until(lambda: "a" in replica)
        leaving.cancel()
        assert await staying, "it was on its way"


async def test_too_many_hints_at_once_are_refused_and_equal_ones_are_one(store: Path) -> None:
    may_load = asyncio.Event()
    calls: list[str] = []

    async def load(model_id: str) -> Any:
        calls.append(model_id)
        await may_load.wait()

    async with replica_with_room(store) as replica:
        hints = Preparations(replica, load)
        running = [asyncio.create_task(hints.prepare(hint(f"m{n % 16}"))) for n in range(40)]
        await until(lambda: len(calls) == 16)
        with pytest.raises(QueueFull):
            await hints.prepare(hint("another"))
        may_load.set()
        assert sum(await asyncio.gather(*running)) == 24, "of those who found it on its way"
        assert len(calls) == 16
        await hints.prepare(hint("another"))


async def test_an_unknown_model_is_not_found(store: Path) -> None:
    async with replica_with_room(store) as replica:
        hints = Preparations(replica, replica.part)
        with pytest.raises(ModelNotFound):
            await hints.prepare(hint("nowhere"))
        await until(lambda: not hints._loading)


async def test_controlnets_are_loaded_beside_the_model(store: Path) -> None:
    async with replica_with_room(store) as replica:
        controlnets = ControlNets(store, _CPU)
        replica.share(controlnets)
        await Preparations(replica, replica.part, controlnets).prepare(hint("a", controlnet_ids=("control-sd",)))
        assert held(replica) == ["a", "control-sd"]


async def test_controlnets_are_refused_where_none_are_taken(store: Path) -> None:
    async with replica_with_room(store) as replica:
        with pytest.raises(InvalidField, match="controlnet_ids"):
            await Preparations(replica, replica.part).prepare(hint("a", controlnet_ids=("control-sd",)))


async def test_files_of_loras_are_fetched_beside_the_model(store: Path) -> None:
    async with replica_with_room(store) as replica:
        hints = Preparations(replica, replica.part)
        await hints.prepare(hint("a", loras=(LoraUse("ink", 1.0), LoraUse("unknown", 1.0))))
        await until(lambda: replica.store.held_bytes("ink") > 0)


async def test_requests_do_not_wait_behind_files_that_hints_fetch(store: Path) -> None:
    is_reading, may_go_on = threading.Event(), threading.Event()

    def read(name: str) -> Any:
        del name
        is_reading.set()
        may_go_on.wait(20.0)

    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
    async with replica_with_room(store) as replica:
        replica.store.read = read  # type: ignore[method-assign,assignment]
        replica.prefetch("a", [LoraUse("ink", 1.0)])
        try:
            await until(is_reading.is_set)
            await asyncio.wait_for(asyncio.to_thread(lambda: None), 8.0)
        finally:
            may_go_on.set()


async def test_nobody_waits_for_a_hint_at_a_replica_that_goes_down(store: Path) -> None:
    may_load = asyncio.Event()

    async def load(model_id: str) -> Any:
        del model_id
        await may_load.wait()

    async with replica_with_room(store) as replica:
        hints = Preparations(replica, load)
        waiting = asyncio.create_task(hints.prepare(hint("far away")))
        await until(lambda: bool(hints._loading))
        await hints.end()
        with pytest.raises(Draining):
            await asyncio.wait_for(waiting, 8.0)
        may_load.set()
        await until(lambda: not hints._loading)
