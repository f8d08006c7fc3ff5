"""LoRAs per request against diffusers' `load_lora_weights` and `set_adapters`, one pipeline at a time."""

import asyncio
import gc
import json
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from darkroom.errors import QueueFull, UnusableLora
from darkroom.models.adapters import Adapters, Combination
from darkroom.models.executor import Executor
from darkroom.models.loader import Part, load_part
from darkroom.models.lora import Lora
from darkroom.wire.tasks import LoraUse
from tests.models.lora_runs import (
    Uses,
    denoised,
    embeddings,
    encoded,
    latents,
    plain_pipeline,
    plain_with,
    relative,
    uses_of,
    with_loras,
)
from tests.tiny_loras import (
    denoiser_of,
    diffusers_names,
    dora_names,
    factors,
    is_any,
    is_attention,
    kohya_names,
    magnitudes,
    save_lora,
    save_lora_for,
)

pytestmark = [  # of the plain pipelines
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`"),
    pytest.mark.filterwarnings("ignore:The following alpha_pattern keys"),
]

MODELS = ("tiny-sd", "tiny-sdxl", "tiny-sd3", "tiny-flux")


@pytest.fixture
def executor() -> Iterator[Executor]:
    executor = Executor(max_batch_rows=32)
    yield executor
    executor.close()


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path


def plain_latents(
    models: Path, part: Part, store: Path, given: dict[str, torch.Tensor], requests: tuple[Uses, ...]
) -> list[torch.Tensor]:
    """What diffusers draws for each request, one at a time; the first is without LoRAs."""
    assert requests[0] == ()
    base = latents(plain_pipeline(models, part.model_id), given, 5)
    adapted = plain_with(
        models,
        part.model_id,
        store,
        tuple((lora_id, 1.0) for lora_id in sorted({lora_id for uses in requests for lora_id, _ in uses})),
    )
    expected = [base]
    for uses in requests[1:]:
        adapted.set_adapters([lora_id for lora_id, _ in uses], [scale for _, scale in uses])
        expected.append(latents(adapted, given, 5))
    return expected


async def check_against_diffusers(
    models: Path, part: Part, store: Path, executor: Executor, requests: tuple[Uses, ...]
) -> None:
    """Each request alone bit for bit, then all of them at once in shared batches."""
    adapters, given = Adapters(part, store), embeddings(models, part)
    expected = plain_latents(models, part, store, given, requests)
    assert all(relative(other, expected[0]) > 0.01 for other in expected[1:])
    combinations = [await adapters.load(uses_of(uses)) if uses else None for uses in requests]
    programs = [partial(denoised, part, combination, given) for combination in combinations]
    for program, latent in zip(programs, expected, strict=True):
        assert torch.equal(executor.submit(program, alone=True)[0].result(60), latent)
    runs = [executor.submit(program) for program in programs]
    for (future, counts), latent in zip(runs, expected, strict=True):
        assert relative(future.result(60), latent) <= 1e-5
        assert counts.batched > 0


@pytest.mark.parametrize("model_id", MODELS)
async def test_requests_with_other_loras_share_batches_and_match_diffusers(
    tiny_store: Path, store: Path, executor: Executor, model_id: str
) -> None:
    for seed, lora_id in enumerate(("ink", "chalk")):
        save_lora_for(store, lora_id, tiny_store / model_id, seed=seed, rank=3 + seed)
    save_lora_for(store, "dora", tiny_store / model_id, seed=2, dora=True)
    part = load_part(tiny_store, model_id, "denoiser", torch.device("cpu"))
    requests: tuple[Uses, ...] = (
        (),
        (("ink", 0.7),),
        (("ink", -1.3),),
        (("chalk", 1.0),),
        (("ink", 1.0), ("chalk", 0.5)),
        (("chalk", 0.5), ("ink", 1.0)),
        (("dora", 0.7),),
        (("dora", -1.3),),
        (("dora", 1.0), ("ink", 0.5)),
        (("ink", 0.5), ("dora", 1.0)),
    )
    await check_against_diffusers(tiny_store, part, store, executor, requests)


@pytest.mark.parametrize("model_id", ["tiny-sd", "tiny-sdxl"])
@pytest.mark.parametrize("are_alphas_equal", [True, False])
async def test_files_of_kohya_match_diffusers(
    tiny_store: Path, store: Path, executor: Executor, model_id: str, *, are_alphas_equal: bool
) -> None:
    _, unet = denoiser_of(plain_pipeline(tiny_store, model_id))
    tensors = kohya_names("unet", factors(unet, is_any, rank=4, seed=3), alpha=2.0)
    if not are_alphas_equal:
        tensors |= {name: torch.tensor(6.0) for name in tensors if name.endswith(("conv1.alpha", "attn1_to_q.alpha"))}
    save_lora(store, "kohya", tensors)
    part = load_part(tiny_store, model_id, "denoiser", torch.device("cpu"))
    await check_against_diffusers(tiny_store, part, store, executor, ((), (("kohya", 0.9),)))


async def test_a_file_of_kohya_for_flux_matches_diffusers(tiny_store: Path, store: Path, executor: Executor) -> None:
    """It holds query, key and value as one product, which diffusers splits."""
    noise = torch.Generator().manual_seed(4)

    def product(name: str, wide_in: int, wide_out: int) -> dict[str, torch.Tensor]:
        return {
            f"lora_unet_{name}.lora_down.weight": torch.randn(4, wide_in, generator=noise),
            f"lora_unet_{name}.lora_up.weight": torch.randn(wide_out, 4, generator=noise),
            f"lora_unet_{name}.alpha": torch.tensor(2.0),
        }

    tensors = product("double_blocks_0_img_attn_qkv", 32, 96) | product("double_blocks_1_txt_mlp_0", 32, 128)
    save_lora(store, "kohya", tensors)
    part = load_part(tiny_store, "tiny-flux", "denoiser", torch.device("cpu"))
    await check_against_diffusers(tiny_store, part, store, executor, ((), (("kohya", 0.9),)))
    save_lora(store, "wide", tensors | product("single_blocks_0_linear1", 32, 224))  # diffusers knows real widths only
    with pytest.raises(UnusableLora, match="do not fit FluxPipeline"):
        await Adapters(part, store).load([LoraUse("wide", 1.0)])
    save_lora(store, "more", tensors | product("double_blocks_0_img_attn_other", 32, 32))
    with pytest.raises(UnusableLora, match="do not fit FluxPipeline"):
        await Adapters(part, store).load([LoraUse("more", 1.0)])
    save_lora(store, "other", tensors | {"lora_te2_x.lora_up.weight": torch.ones(32, 4)})
    with pytest.raises(UnusableLora, match="leaves out"):
        await Adapters(part, store).load([LoraUse("other", 1.0)])


@pytest.mark.parametrize(
    "config",
    [
        {"lora_alpha": 7},
        {"lora_alpha": 7, "use_rslora": True},
        {"lora_alpha": 4, "alpha_pattern": {"to_q": 9, "down_blocks.0.resnets.0.conv1": 1}},
    ],
)
async def test_the_metadata_of_a_file_sets_the_strength_as_in_diffusers(
    tiny_store: Path, store: Path, executor: Executor, config: dict[str, Any]
) -> None:
    _, unet = denoiser_of(plain_pipeline(tiny_store, "tiny-sd"))
    tensors = diffusers_names("unet", factors(unet, is_any, rank=4, seed=3))
    modules = sorted({name.removeprefix("unet.").rsplit(".lora_", 1)[0] for name in tensors})
    said = {f"unet.{key}": value for key, value in {"r": 4, "target_modules": modules, **config}.items()}
    save_lora(store, "said", tensors, metadata={"lora_adapter_metadata": json.dumps(said)})
    part = load_part(tiny_store, "tiny-sd", "denoiser", torch.device("cpu"))
    await check_against_diffusers(tiny_store, part, store, executor, ((), (("said", 0.9),)))


@pytest.mark.parametrize("model_id", MODELS)
@pytest.mark.parametrize("dora", [False, True])
async def test_the_encoder_stage_applies_its_part_of_a_lora(
    tiny_store: Path, store: Path, executor: Executor, model_id: str, *, dora: bool
) -> None:
    plain = plain_pipeline(tiny_store, model_id)
    name, denoiser = denoiser_of(plain)
    tensors = diffusers_names(name, factors(denoiser, is_attention, rank=2, seed=1))
    part = load_part(tiny_store, model_id, "encoder", torch.device("cpu"))
    clips = [name for name, network in part.networks.items() if "CLIP" in type(network).__name__]
    for clip in clips:
        pairs = factors(getattr(plain, clip), is_attention, rank=2, seed=2, strength=1.0)
        tensors |= diffusers_names(clip, pairs)
        if dora:
            tensors |= dora_names(clip, magnitudes(getattr(plain, clip), pairs, seed=3), end=".weight")
    save_lora(store, "words", tensors)
    combination = await Adapters(part, store).load([LoraUse("words", 0.8)])
    assert sorted(combination.stand_ins()) == sorted(clips)
    assert combination.elsewhere == {name}
    with torch.no_grad():
        expected = encoded(plain_with(tiny_store, model_id, store, (("words", 0.8),)), part)
        without = encoded(plain, part)

    def program(held: Combination | None) -> list[torch.Tensor]:
        return encoded(with_loras(part, held), part)

    alone = executor.submit(partial(program, combination), alone=True)[0].result(60)
    assert all(torch.equal(found, value) for found, value in zip(alone, expected, strict=True))
    assert any(relative(value, other) > 0.01 for value, other in zip(expected, without, strict=True))
    runs = [executor.submit(partial(program, held)) for held in (combination, None, combination)]
    for (future, counts), values in zip(runs, (expected, without, expected), strict=True):
        assert all(relative(found, value) <= 1e-5 for found, value in zip(future.result(60), values, strict=True))
        assert counts.batched > 0


@dataclass(slots=True)
class SlowAdapters(Adapters):
    """Counts reads, and holds each until it is let go."""

    may_go: threading.Event = field(default_factory=threading.Event)
    read_ids: list[str] = field(default_factory=list)

    def _read_and_adapt(self, lora_id: str) -> Lora:
        self.read_ids.append(lora_id)
        assert self.may_go.wait(30)
        return Adapters._read_and_adapt(self, lora_id)


@pytest.fixture
def part(tiny_store: Path) -> Part:
    return load_part(tiny_store, "tiny-sd", "denoiser", torch.device("cpu"))


async def test_forty_requests_for_a_cold_lora_read_it_once(tiny_store: Path, store: Path, part: Part) -> None:
    save_lora_for(store, "ink", tiny_store / "tiny-sd", seed=1)
    adapters = SlowAdapters(part, store)
    loads = [asyncio.create_task(adapters.load([LoraUse("ink", i / 40)])) for i in range(40)]
    await asyncio.sleep(0.05)
    loads[0].cancel()
    adapters.may_go.set()
    answers = await asyncio.gather(*loads, return_exceptions=True)
    assert isinstance(answers[0], asyncio.CancelledError)
    assert all(isinstance(answer, Combination) for answer in answers[1:])
    assert adapters.read_ids == ["ink"]


async def test_others_go_on_while_a_lora_is_read(tiny_store: Path, store: Path, part: Part, executor: Executor) -> None:
    save_lora_for(store, "ink", tiny_store / "tiny-sd", seed=1)
    adapters, given = SlowAdapters(part, store), embeddings(tiny_store, part)
    load = asyncio.create_task(adapters.load([LoraUse("ink", 1.0)]))
    run, _ = executor.submit(lambda: latents(with_loras(part, None), given, 1))
    expected = latents(plain_pipeline(tiny_store, "tiny-sd"), given, 1)
    assert torch.equal(await asyncio.wait_for(asyncio.wrap_future(run), 30), expected)
    assert not load.done()
    adapters.may_go.set()
    with await load as combination:
        assert list(combination.stand_ins()) == ["unet"]


async def test_loading_leaves_the_network_itself_and_its_memory_as_they_were(
    tiny_store: Path, store: Path, part: Part, executor: Executor
) -> None:
    save_lora_for(store, "ink", tiny_store / "tiny-sd", seed=1)
    adapters, given, unet = Adapters(part, store), embeddings(tiny_store, part), part.networks["unet"]
    before = [id(module.forward.__func__) for module in unet.modules() if hasattr(module.forward, "__func__")]
    combination = await adapters.load([LoraUse("ink", 1.0)])
    assert before == [id(module.forward.__func__) for module in unet.modules() if hasattr(module.forward, "__func__")]
    tree = adapters._networks["unet"]._tree
    assert tree is not None
    assert [parameter.data_ptr() for parameter in tree.parameters()] == [p.data_ptr() for p in unet.parameters()]
    executor.submit(lambda: latents(with_loras(part, combination), given, 1))[0].result(60)
    found = executor.submit(lambda: latents(with_loras(part, None), given, 1), alone=True)[0].result(60)
    assert torch.equal(found, latents(plain_pipeline(tiny_store, "tiny-sd"), given, 1))


async def test_what_nobody_holds_goes_for_good_when_room_is_needed(tiny_store: Path, store: Path, part: Part) -> None:
    for i in range(6):
        save_lora_for(store, f"lora-{i}", tiny_store / "tiny-sd", seed=i)
    adapters = Adapters(part, store)
    first = await adapters.load([LoraUse("lora-0", 1.0)])
    (size_bytes,) = adapters.resident().values()
    adapters.max_bytes = 3 * size_bytes
    gone = []
    for i in range(1, 5):
        with await adapters.load([LoraUse(f"lora-{i}", 1.0)]) as combination:
            gone.append(weakref.ref(combination.loras[0].lora.networks["unet"]["down_blocks.0.resnets.0.conv1"].down))
        del combination
    assert list(adapters.resident()) == ["lora-0", "lora-3", "lora-4"]
    gc.collect()
    assert [reference() is None for reference in gone] == [True, True, False, False]
    first.release()
    first.release()
    with await adapters.load([LoraUse("lora-3", 1.0), LoraUse("lora-5", 1.0)]):
        assert list(adapters.resident()) == ["lora-4", "lora-3", "lora-5"]
    assert all(not kept.holder_count for kept in adapters._kept.values())


async def test_a_request_is_told_to_wait_when_running_ones_hold_all_room(
    tiny_store: Path, store: Path, part: Part
) -> None:
    for i in range(3):
        save_lora_for(store, f"lora-{i}", tiny_store / "tiny-sd", seed=i)
    adapters = Adapters(part, store)
    first = await adapters.load([LoraUse("lora-0", 1.0)])
    adapters.max_bytes = 2 * sum(adapters.resident().values())
    second = await adapters.load([LoraUse("lora-1", 1.0)])
    with pytest.raises(QueueFull):
        await adapters.load([LoraUse("lora-2", 1.0)])
    assert list(adapters.resident()) == ["lora-0", "lora-1"]
    first.release()
    (await adapters.load([LoraUse("lora-2", 1.0)])).release()
    second.release()


async def test_a_combination_let_go_too_early_does_no_harm(
    tiny_store: Path, store: Path, part: Part, executor: Executor
) -> None:
    for i in range(2):
        save_lora_for(store, f"lora-{i}", tiny_store / "tiny-sd", seed=i)
    adapters, given = Adapters(part, store), embeddings(tiny_store, part)
    combination = await adapters.load([LoraUse("lora-0", 1.0)])
    pipeline = with_loras(part, combination)
    combination.release()
    adapters.max_bytes = sum(adapters.resident().values())
    (await adapters.load([LoraUse("lora-1", 1.0)])).release()
    assert list(adapters.resident()) == ["lora-1"]
    found = executor.submit(partial(latents, pipeline, given, 5), alone=True)[0].result(60)
    expected = plain_with(tiny_store, "tiny-sd", store, (("lora-0", 1.0),))
    assert torch.equal(found, latents(expected, given, 5))
