"""The device's budget: idle models leave it for others, those in use stay, and what cannot fit is refused."""

import asyncio
import shutil
import weakref
from pathlib import Path

import pytest
import torch

from darkroom.errors import DeviceFull, ModelNotFound, UnusableModel
from darkroom.models.loader import load_part, part_sizes
from darkroom.models.program import Ticket
from darkroom.models.replica import StageReplica
from darkroom.models.residency import Entry, Residency
from darkroom.models.store.model_store import model_store
from darkroom.policy.appraisal import Asked
from darkroom.policy.eviction import Resident
from darkroom.policy.worth import Tier
from darkroom.store.evicting import Eviction, EvictionKind
from darkroom.store.opening import open_source
from tests.tiny_models import save_tiny_model

_CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five models of one size; c shares its UNet's file with b."""
    root = tmp_path_factory.mktemp("store")
    save_tiny_model(root, "tiny-sd")
    for name in "abcd":
        shutil.copytree(root / "tiny-sd", root / name)
    file = root / "c" / "unet" / "diffusion_pytorch_model.safetensors"
    file.unlink()
    file.hardlink_to(root / "b" / "unet" / "diffusion_pytorch_model.safetensors")
    return root


def _size(store: Path) -> int:
    return sum(part_sizes(store, "a", "denoiser", _CPU).values())


def _replica(
    store: Path, budget_bytes: int, *, wait_s: float = 0.1, kind: EvictionKind = "worth", host_cache_bytes: int = 0
) -> StageReplica:
    eviction = Eviction(kind)
    source = open_source(store, store, 0, eviction=eviction)
    replica = StageReplica(
        replica_id="r",
        stage="denoiser",
        model_store=model_store(
            source, device="cpu", pool_bytes=0, host_cache_bytes=host_cache_bytes, eviction=eviction
        ),
        device="cpu",
        max_running=8,
        max_batch_rows=8,
        thread_count=1,
        device_budget_bytes=budget_bytes,
    )
    replica._residency._wait_s = wait_s
    return replica


async def _ask(replica: StageReplica, model_id: str, count: int = 1) -> None:
    """Requests, one after the other, as stages run them."""
    for _ in range(count):
        async with replica.accepted():
            await replica.part(model_id)
            await replica.run(lambda: None, Ticket(request_id="r"))


def _held(replica: StageReplica) -> list[str]:
    return [part.model_id for part in replica.state().parts]


def test_a_part_takes_as_many_bytes_as_was_said(store: Path) -> None:
    for stage in ("encoder", "denoiser", "vae"):
        part = load_part(store, "a", stage, _CPU)
        assert sum(state.resident_bytes for state in part.network_states()) == pytest.approx(
            sum(part_sizes(store, "a", stage, _CPU).values()), abs=1000
        )


async def test_without_a_budget_everything_stays(store: Path) -> None:
    replica = _replica(store, 0)
    for name in "ab":
        await replica.part(name)
    assert _held(replica) == ["a", "b"]
    replica.close()


async def test_the_model_used_longest_ago_leaves_and_that_is_announced(store: Path) -> None:
    replica, said = _replica(store, 2 * _size(store)), list[set[str]]()

    async def announce(model_ids: object) -> None:
        said.append(set(model_ids))  # type: ignore[call-overload]

    replica.on_loaded = announce
    for name in ("a", "b", "a", "tiny-sd"):
        async with replica.accepted():
            await replica.part(name)
    await asyncio.sleep(0)
    assert _held(replica) == ["a", "tiny-sd"]
    assert said[-1] == {"a", "tiny-sd"}
    replica.close()


async def test_what_is_dropped_frees_its_memory(store: Path) -> None:
    replica = _replica(store, _size(store))
    async with replica.accepted():
        part = await replica.part("a")
        weight = weakref.ref(next(part.networks["unet"].parameters()))
    del part
    async with replica.accepted():
        await replica.part("b")
    assert weight() is None
    replica.close()


async def test_a_model_in_use_stays_and_the_other_waits_for_it_but_not_for_ever(store: Path) -> None:
    replica = _replica(store, _size(store), wait_s=0.2)
    async with replica.accepted():
        await replica.part("a")
        with pytest.raises(DeviceFull, match="no room"):
            async with replica.accepted():
                await replica.part("b")
        assert _held(replica) == ["a"]
        replica._residency._wait_s = 20.0
        waiting = asyncio.create_task(replica.part("b"))
        await asyncio.sleep(0.3)
        assert not waiting.done()
    await waiting
    assert _held(replica) == ["b"]
    replica.close()


async def test_a_model_larger_than_the_device_is_refused_and_drops_nothing(store: Path) -> None:
    replica = _replica(store, _size(store) - 1)
    with pytest.raises(UnusableModel, match="needs"):
        await replica.part("a")
    replica.close()


async def test_models_that_share_files_take_their_room_once(store: Path) -> None:
    replica = _replica(store, _size(store))
    for name in "bc":
        async with replica.accepted():
            await replica.part(name)
    assert _held(replica) == ["b", "c"]
    replica.close()


async def test_a_load_that_fails_takes_no_room(store: Path) -> None:
    replica = _replica(store, _size(store))
    with pytest.raises(ModelNotFound):
        await replica.part("nowhere")
    await replica.part("a")
    assert len(replica._residency._entries) == 1
    replica.close()


async def test_what_is_asked_for_outside_a_request_is_held_by_nobody() -> None:
    residency = Residency(10)
    with residency.holding(), residency.holding():
        pass
    assert residency._entries == []


@pytest.mark.parametrize(("kind", "kept"), [("worth", ["a", "d"]), ("lru", ["b", "d"])])
async def test_a_model_asked_for_often_stays_where_the_one_used_longest_ago_would_go(
    store: Path, kind: EvictionKind, kept: list[str]
) -> None:
    replica = _replica(store, 2 * _size(store), kind=kind)
    await _ask(replica, "a", count=5)
    await _ask(replica, "b")
    await _ask(replica, "d")
    assert _held(replica) == kept
    replica.close()


async def test_a_model_that_is_held_but_that_no_request_ran_goes_first(store: Path) -> None:
    replica = _replica(store, 2 * _size(store))
    await _ask(replica, "a")
    async with replica.accepted():
        await replica.part("b")
    await _ask(replica, "d")
    assert _held(replica) == ["a", "d"]
    replica.close()


@pytest.mark.parametrize("kind", ["worth", "lru"])
async def test_a_pinned_model_stays_and_what_only_it_could_make_room_for_fails(store: Path, kind: EvictionKind) -> None:
    replica = _replica(store, 2 * _size(store), kind=kind)
    replica.eviction.pin({"a"})
    await _ask(replica, "a")
    await _ask(replica, "b", count=3)
    await _ask(replica, "d")
    assert _held(replica) == ["a", "d"]
    replica.eviction.pin({"a", "d"})
    with pytest.raises(DeviceFull):
        await _ask(replica, "b")
    assert _held(replica) == ["a", "d"]
    replica.close()


async def test_a_load_that_pins_leave_no_room_for_drops_nothing(store: Path) -> None:
    replica = _replica(store, 2 * _size(store))
    for name in "ad":
        await _ask(replica, name)
    replica.eviction.pin({"a"})
    residency = replica._residency
    large = Entry("large", lambda: None, {"x": 2 * _size(store)}, ("large",))
    with pytest.raises(DeviceFull):
        await residency.admit(large)
    assert _held(replica) == ["a", "d"]
    replica.close()


async def test_what_the_cluster_asks_for_counts_more_than_what_was_seen_here(store: Path) -> None:
    replica = _replica(store, 2 * _size(store))
    replica.eviction.tell({"a": Asked(rate=0.0, run_s=1.0), "b": Asked(rate=1.0, run_s=1.0)}, fresh_s=60.0)
    await _ask(replica, "b")
    await _ask(replica, "a", count=3)
    await _ask(replica, "d")
    assert _held(replica) == ["b", "d"]
    replica.close()


async def test_loras_and_adapters_are_asked_for_by_the_requests_that_use_them() -> None:
    eviction = Eviction()
    residency = Residency(eviction=eviction)
    with residency.holding():
        residency.hold(Entry("(a, (style,))", lambda: None, models=("a", "style")))
        residency.uses(["ink"])
        residency.ran(1.0)
    evict = eviction.of(Tier.HOST, lambda _: 0.0)
    names = ("style", "other", "ink", "a")
    files = [Resident(name=name, size_bytes=1.0, used_s=0.0, models=(name,)) for name in names]
    assert evict(files, 1.0) == ["other"]
