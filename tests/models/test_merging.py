"""Which pairs a replica keeps merged, what of the device they take, and when they go."""

import asyncio
import gc
import math
import shutil
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from darkroom.errors import DeviceFull, StoreUnavailable
from darkroom.models.adapters import Adapters
from darkroom.models.loader import part_sizes
from darkroom.models.merging import MergedPairs, name_of
from darkroom.models.program import Ticket
from darkroom.models.replica import StageReplica
from darkroom.wire.tasks import LoraUse
from tests.tiny_loras import save_lora_for
from tests.tiny_models import save_tiny_model

INK, CHALK = (LoraUse("ink", 1.0),), (LoraUse("chalk", 0.5),)
CHANGED = "down_blocks.0.resnets.0.conv1.weight"
"""Of the network, by either LoRA."""
DEAR, CHEAP = 2.0, 0.5
"""What a request takes with its LoRAs, by what it takes without: twice as much, and, in company, half."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models of one size, two LoRAs of one size for either."""
    root = tmp_path_factory.mktemp("store")
    save_tiny_model(root, "tiny-sd")
    shutil.copytree(root / "tiny-sd", root / "other")
    for seed, name in enumerate(("ink", "chalk")):
        save_lora_for(root, name, root / "tiny-sd", seed=seed)
        (root / name / "darkroom.json").unlink()
    return root


class Merging:
    """A replica that keeps pairs merged, and looks them over when it is told to."""

    def __init__(self, store: Path, *, budget_bytes: int = 0, most: int = 50, max_bytes: float = math.inf) -> None:
        self.replica = StageReplica(
            replica_id="r",
            stage="denoiser",
            model_store=store,
            device="cpu",
            max_running=8,
            max_batch_rows=8,
            thread_count=1,
            device_budget_bytes=budget_bytes,
        )
        self.replica._residency._wait_s = 0.1
        self.replica.keep_merged(most, max_bytes)
        assert self.replica._merging
        self.pairs: MergedPairs = self.replica._merging
        self.pairs._due_s = math.inf

    @asynccontextmanager
    async def request(
        self, uses: tuple[LoraUse, ...], ratio: float = DEAR, *, model_id: str = "tiny-sd", alone: bool = False
    ) -> AsyncIterator[bool]:
        """A request while it runs, of that cost if it runs beside the base. Yields whether it runs merged."""
        ticket = Ticket(adapted_s=ratio, bare_s=1.0, alone=alone)
        async with self.replica.accepted():
            part = await self.replica.part(model_id)
            before = self._held()
            async with self.replica.adapted(part, uses, ticket) as stand_ins:
                assert list(stand_ins) == ["unet"]
                is_merged = self._held() > before
                if is_merged:
                    ticket.adapted_s = 1.0
                yield is_merged

    def _held(self) -> int:
        return sum(copy.holder_count for copy in self.pairs._copies.values())

    async def ask(self, uses: tuple[LoraUse, ...], ratio: float = DEAR, *, model_id: str = "tiny-sd") -> bool:
        """A whole request, and a look at the pairs after it. Returns whether it ran merged."""
        async with self.request(uses, ratio, model_id=model_id) as is_merged:
            pass
        await self.pairs.look()
        return is_merged

    @property
    def merged(self) -> dict[str, list[tuple[LoraUse, ...]]]:
        states = self.replica.state().merged
        return {model_id: [pair.loras for pair in pairs] for model_id, pairs in states.items() if pairs}

    @property
    def models(self) -> list[str]:
        return [part.model_id for part in self.replica.state().parts]

    @property
    def counted(self) -> int:
        return sum(sum(entry.sizes.values()) for entry in self.replica._residency._entries)


@pytest.fixture
async def sizes(store: Path) -> tuple[int, int, int]:
    """Bytes of a part, of a LoRA, of what a merged copy has of its own."""
    kept = Merging(store)
    await kept.ask(INK)
    (pair,) = kept.replica.state().merged["tiny-sd"]
    (part,) = kept.replica.state().parts
    lora_bytes: int = part.beside["loras"].resident()["ink"]  # type: ignore[union-attr]  # it is a part
    kept.replica.close()
    part_bytes = sum(part_sizes(store, "tiny-sd", "denoiser", torch.device("cpu")).values())
    assert 0 < pair.size_bytes < part_bytes
    return part_bytes, lora_bytes, pair.size_bytes


async def test_a_pair_that_pays_is_merged_and_later_requests_of_it_run_so(store: Path) -> None:
    kept = Merging(store)
    assert not await kept.ask(INK)
    assert kept.merged == {"tiny-sd": [INK]}
    assert await kept.ask(INK)
    assert not await kept.ask(CHALK)
    assert kept.merged == {"tiny-sd": [INK, CHALK]}
    assert not await kept.ask((LoraUse("ink", 0.9),))
    kept.replica.close()


async def test_a_pair_whose_requests_cost_less_in_company_is_not_merged(store: Path) -> None:
    kept = Merging(store)
    await kept.ask(INK, CHEAP)
    assert kept.merged == {}
    kept.replica.close()


async def test_a_pair_that_pays_no_more_is_let_go(store: Path, sizes: tuple[int, int, int]) -> None:
    part_bytes, lora_bytes, merged_bytes = sizes
    kept = Merging(store, budget_bytes=10 * part_bytes)
    await kept.ask(INK)
    assert kept.counted == part_bytes + lora_bytes + merged_bytes
    for _ in range(100):  # one in some runs beside the base, where it is cheap by now
        async with kept.request(INK) as is_merged:
            pass
        if not is_merged:
            break
    else:
        raise AssertionError("none of a hundred requests ran beside the base")
    for _ in range(20):
        now_s = kept.pairs.clock()
        kept.pairs.costs.add(name_of("tiny-sd", INK), now_s, adapted_s=CHEAP, bare_s=1.0, is_merged=False)
    await kept.pairs.look()
    assert kept.merged == {}
    assert kept.counted == part_bytes + lora_bytes
    kept.replica.close()


async def test_a_request_that_has_to_run_alone_never_runs_merged(store: Path) -> None:
    kept = Merging(store)
    await kept.ask(INK)
    async with kept.request(INK, alone=True) as is_merged:
        assert not is_merged
    async with kept.request(INK) as is_merged:
        assert is_merged
    kept.replica.close()


async def test_requests_that_run_alone_merge_nothing(store: Path) -> None:
    kept = Merging(store)
    async with kept.request(INK, alone=True):
        pass
    await kept.pairs.look()
    assert kept.merged == {}
    kept.replica.close()


async def test_a_part_that_was_made_of_another_runs_its_loras_beside(store: Path) -> None:
    kept = Merging(store)
    await kept.ask(INK)
    async with kept.replica.accepted():
        made = replace(await kept.replica.part("tiny-sd"))
        async with kept.replica.adapted(made, INK, Ticket()):
            assert kept._held() == 0
    kept.replica.close()


async def test_merged_copies_leave_before_any_model(store: Path, sizes: tuple[int, int, int]) -> None:
    part_bytes, lora_bytes, merged_bytes = sizes
    kept = Merging(store, budget_bytes=2 * part_bytes + lora_bytes + merged_bytes // 2)
    await kept.ask(INK)
    assert kept.counted == part_bytes + lora_bytes + merged_bytes
    async with kept.replica.accepted():
        await kept.replica.part("other")
    assert kept.models == ["other", "tiny-sd"]
    assert kept.merged == {}
    assert kept.counted == 2 * part_bytes + lora_bytes
    kept.replica.close()


async def test_only_as_many_copies_leave_as_are_in_the_way(store: Path, sizes: tuple[int, int, int]) -> None:
    part_bytes, lora_bytes, merged_bytes = sizes
    kept = Merging(store, budget_bytes=2 * part_bytes + 2 * lora_bytes + merged_bytes)
    for _ in range(2):
        await kept.ask(INK)
    await kept.ask(CHALK)
    assert kept.merged == {"tiny-sd": [INK, CHALK]}
    async with kept.replica.accepted():
        await kept.replica.part("other")
    assert kept.models == ["other", "tiny-sd"]
    assert kept.merged == {"tiny-sd": [INK]}
    kept.replica.close()


async def test_a_merged_copy_pushes_nothing_out(store: Path, sizes: tuple[int, int, int]) -> None:
    part_bytes, lora_bytes, merged_bytes = sizes
    kept = Merging(store, budget_bytes=2 * part_bytes + lora_bytes + merged_bytes - 1)
    async with kept.replica.accepted():
        await kept.replica.part("other")
    await kept.ask(INK)
    assert kept.merged == {}
    assert kept.models == ["other", "tiny-sd"]
    assert await kept.replica.release("other")
    await kept.pairs.look()
    assert kept.merged == {"tiny-sd": [INK]}
    kept.replica.close()


async def test_a_hint_that_finds_no_room_costs_no_merged_copy(store: Path, sizes: tuple[int, int, int]) -> None:
    kept = Merging(store, budget_bytes=sum(sizes))
    await kept.ask(INK)
    async with kept.replica.accepted():
        await kept.replica.part("tiny-sd")
        with kept.replica.preparing(), pytest.raises(DeviceFull):
            await kept.replica.part("other")
    assert kept.merged == {"tiny-sd": [INK]}
    kept.replica.close()


async def test_merged_copies_leave_before_loras_that_nobody_uses(store: Path, sizes: tuple[int, int, int]) -> None:
    kept = Merging(store, budget_bytes=sum(sizes) + sizes[1] // 2)
    for uses in (INK, CHALK):
        await kept.ask(uses)
    (part,) = kept.replica.state().parts
    assert sorted(part.beside["loras"].resident()) == ["chalk", "ink"]  # type: ignore[union-attr]  # it is a part
    assert kept.merged == {}
    kept.replica.close()


async def test_the_best_pairs_are_kept_up_to_count_and_bytes(store: Path, sizes: tuple[int, int, int]) -> None:
    for bound in ({"most": 1}, {"max_bytes": 1.5 * sizes[2]}):
        kept = Merging(store, **bound)
        await kept.ask(CHALK)
        assert kept.merged == {"tiny-sd": [CHALK]}
        await kept.ask(INK)
        assert kept.merged == {"tiny-sd": [CHALK]}  # the other is no better by enough
        await kept.ask(INK)
        assert kept.merged == {"tiny-sd": [INK]}
        kept.replica.close()


async def test_a_request_keeps_the_copy_that_it_began_with(store: Path, sizes: tuple[int, int, int]) -> None:
    part_bytes, lora_bytes, merged_bytes = sizes
    kept = Merging(store, budget_bytes=2 * part_bytes + lora_bytes + merged_bytes // 2)
    await kept.ask(INK)
    async with kept.request(INK) as is_merged:
        assert is_merged
        kept.pairs.most = 0
        await kept.pairs.look()
        async with kept.request(INK) as other_is_merged:
            assert not other_is_merged
        kept.pairs.spare(1)
        assert kept.counted == part_bytes + lora_bytes + merged_bytes
        assert kept.merged == {"tiny-sd": [INK]}
    assert kept.merged == {}
    assert kept.counted == part_bytes + lora_bytes
    kept.replica.close()


@pytest.mark.parametrize("is_pushed_out", [True, False])
async def test_a_model_that_had_a_merged_pair_frees_all_memory_when_it_leaves(
    store: Path, sizes: tuple[int, int, int], *, is_pushed_out: bool
) -> None:
    part_bytes, lora_bytes, merged_bytes = sizes
    kept = Merging(store, budget_bytes=part_bytes + lora_bytes + merged_bytes)
    await kept.ask(INK)
    (copy,) = kept.pairs._copies.values()
    base = kept.replica.state().parts[0].networks["unet"]
    weights = [weakref.ref(next(base.parameters()))]
    weights.append(weakref.ref(copy.networks["unet"].tree.get_parameter(CHANGED)))
    assert weights[1]() is not base.get_parameter(CHANGED)
    del copy, base
    gc.collect()
    gc.disable()
    try:
        if is_pushed_out:
            await kept.ask(CHALK, model_id="other")
        else:
            assert await kept.replica.release("tiny-sd")
        assert [weight() for weight in weights] == [None, None]
    finally:
        gc.enable()
    assert kept.merged == ({"other": [CHALK]} if is_pushed_out else {})
    assert kept.counted == (part_bytes + lora_bytes + merged_bytes if is_pushed_out else 0)
    kept.replica.close()


async def test_a_copy_that_is_let_go_frees_its_memory_by_itself(store: Path) -> None:
    kept = Merging(store)
    await kept.ask(INK)
    (copy,) = kept.pairs._copies.values()
    weight = weakref.ref(copy.networks["unet"].tree.get_parameter(CHANGED))
    del copy
    await asyncio.sleep(0)  # until then the loop holds what it handed over last: the copy
    gc.collect()
    gc.disable()
    try:
        kept.pairs.spare(1)
        assert weight() is None
    finally:
        gc.enable()
    kept.replica.close()


async def test_a_model_that_comes_back_is_merged_anew(store: Path, sizes: tuple[int, int, int]) -> None:
    kept = Merging(store, budget_bytes=sum(sizes))
    await kept.ask(INK)
    async with kept.replica.accepted():
        await kept.replica.part("other")
    assert kept.models == ["other"]
    await kept.pairs.look()  # nothing to do: the model is not here
    assert kept.merged == {}
    assert not await kept.ask(INK)
    assert kept.merged == {"tiny-sd": [INK]}
    assert await kept.ask(INK)
    kept.replica.close()


async def test_what_cannot_be_merged_goes_on_beside_and_others_are_merged(store: Path, tmp_path: Path) -> None:
    shutil.copytree(store, tmp_path / "store")
    kept = Merging(tmp_path / "store")
    for _ in range(3):
        async with kept.request(INK):
            pass
    async with kept.request(CHALK):
        pass
    (part,) = kept.replica.state().parts
    part.beside["loras"]._drop_unheld(0)  # type: ignore[union-attr]  # it is a part
    shutil.rmtree(tmp_path / "store" / "ink")
    await kept.pairs.look()
    assert kept.merged == {}
    await kept.pairs.look()
    assert kept.merged == {"tiny-sd": [CHALK]}
    kept.replica.close()


async def test_a_pair_that_cannot_be_read_now_is_merged_later_and_others_meanwhile(store: Path) -> None:
    kept = Merging(store)
    for uses in (INK, INK, CHALK):
        async with kept.request(uses):
            pass

    @asynccontextmanager
    async def unavailable(model_id: str) -> AsyncIterator[Adapters | None]:
        raise StoreUnavailable(model_id, "it is down")
        yield

    borrow, kept.pairs.borrow = kept.pairs.borrow, unavailable
    await kept.pairs.look()
    kept.pairs.borrow = borrow
    await kept.pairs.look()
    assert kept.merged == {"tiny-sd": [CHALK]}
    now_s = kept.pairs.clock()
    kept.pairs.clock = lambda: now_s + 40.0
    await kept.pairs.look()
    assert kept.merged == {"tiny-sd": [CHALK, INK]}
    kept.replica.close()


async def test_a_look_comes_by_itself_and_one_at_a_time(store: Path) -> None:
    kept = Merging(store)
    kept.pairs._due_s = 0.0
    for uses in (INK, CHALK):
        async with kept.request(uses):
            pass
    looking = kept.pairs._looking
    assert looking is not None
    async with asyncio.timeout(20):
        await looking
    assert kept.merged == {"tiny-sd": [INK]}
    kept.pairs._due_s = 0.0
    async with kept.request(CHALK):
        pass
    later = kept.pairs._looking
    assert later is not None
    assert later is not looking
    async with asyncio.timeout(20):
        await later
    assert kept.merged == {"tiny-sd": [INK, CHALK]}
    kept.replica.close()
