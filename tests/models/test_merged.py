"""LoRAs merged into copies of networks, against diffusers' `fuse_lora` and PEFT's `merge`."""

import asyncio
import copy
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer

from darkroom.models.adapted import AdaptedNetwork, Mix, Scaled
from darkroom.models.adapters import Adapters, Combination, stand_in_carrying
from darkroom.models.dora import factors_of
from darkroom.models.executor import Executor
from darkroom.models.forwards import Entry, Forward, carrying, run_batch
from darkroom.models.loader import Part, load_part
from darkroom.models.lora import Delta, Lora
from darkroom.models.merged import merge, merged_bytes
from darkroom.models.program import Ticket
from tests.models.lora_runs import Uses, denoised, embeddings, latents, plain_pipeline, plain_with, relative, uses_of
from tests.tiny_loras import denoiser_of, save_lora_for

pytestmark = [  # of the plain pipelines
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`"),
    pytest.mark.filterwarnings("ignore:The following alpha_pattern keys"),
]


@pytest.fixture
def executor() -> Iterator[Executor]:
    executor = Executor(max_batch_rows=32)
    yield executor
    executor.close()


class InWeights:
    """What a request holds of LoRAs that are merged."""

    def __init__(self, part: Part, combination: Combination) -> None:
        self._part, self.networks = part, merge(part.networks, combination.loras)

    def stand_ins(self) -> dict[str, torch.nn.Module]:
        return {
            name: stand_in_carrying(getattr(self._part.pipeline, name), merged)
            for name, merged in self.networks.items()
        }


def fused(models: Path, model_id: str, store: Path, uses: Uses) -> DiffusionPipeline:
    """Diffusers' own way to the same weights."""
    pipeline = plain_with(models, model_id, store, uses)
    pipeline.fuse_lora(components=[denoiser_of(pipeline)[0]])
    return pipeline


@pytest.mark.parametrize("model_id", ["tiny-sd", "tiny-sdxl", "tiny-sd3", "tiny-flux"])
async def test_merged_pairs_draw_what_diffusers_draws_with_fused_loras(
    tiny_store: Path, tmp_path: Path, executor: Executor, model_id: str
) -> None:
    save_lora_for(tmp_path, "ink", tiny_store / model_id, seed=0, rank=3, kohya=model_id == "tiny-sd")
    save_lora_for(tmp_path, "chalk", tiny_store / model_id, seed=1)
    save_lora_for(tmp_path, "dora", tiny_store / model_id, seed=2, dora=True)
    part = load_part(tiny_store, model_id, "denoiser", torch.device("cpu"))
    adapters, given = Adapters(part, tmp_path), embeddings(tiny_store, part)
    base = latents(plain_pipeline(tiny_store, model_id), given, 5)
    requests: tuple[Uses, ...] = (
        (("ink", 0.7),),
        (("ink", -1.3), ("chalk", 0.5)),
        (("dora", 0.7),),
        (("chalk", 0.5), ("dora", 1.0)),
    )
    for uses in requests:
        expected = latents(fused(tiny_store, model_id, tmp_path, uses), given, 5)
        assert relative(expected, base) > 0.01
        merged = InWeights(part, await adapters.load(uses_of(uses)))
        found = executor.submit(partial(denoised, part, merged, given), alone=True)[0].result(60)
        if "dora" in dict(uses):  # a magnitude's factor is worked out for the scale, not for what is scaled
            assert relative(found, expected) <= 1e-5
        else:
            assert torch.equal(found, expected)


async def test_two_pairs_the_base_and_loras_beside_it_are_each_right_in_one_executor(
    tiny_store: Path, tmp_path: Path, executor: Executor
) -> None:
    for seed, lora_id in enumerate(("ink", "chalk")):
        save_lora_for(tmp_path, lora_id, tiny_store / "tiny-sd", seed=seed)
    part = load_part(tiny_store, "tiny-sd", "denoiser", torch.device("cpu"))
    adapters, given = Adapters(part, tmp_path), embeddings(tiny_store, part)
    ink, chalk = [await adapters.load(uses_of(((lora_id, 0.8),))) for lora_id in ("ink", "chalk")]
    base = latents(plain_pipeline(tiny_store, "tiny-sd"), given, 5)
    expected = {"base": base, "beside": latents(plain_with(tiny_store, "tiny-sd", tmp_path, (("ink", 0.8),)), given, 5)}
    for lora_id in ("ink", "chalk"):
        expected[lora_id] = latents(fused(tiny_store, "tiny-sd", tmp_path, ((lora_id, 0.8),)), given, 5)
    held = {"base": None, "beside": ink, "ink": InWeights(part, ink), "chalk": InWeights(part, chalk)}
    asked = ["base", "ink", "chalk", "beside", "ink", "base", "ink", "chalk"]
    _hold(executor)
    runs = [executor.submit(partial(denoised, part, held[name], given)) for name in asked]
    for name, (future, ticket) in zip(asked, runs, strict=True):
        assert relative(future.result(60), expected[name]) <= 1e-5
        assert ticket.batched == ticket.forwards == 3
    assert executor.counts.batches == 3 * 3  # of each step one with and without LoRAs beside, and one of each pair


def _hold(executor: Executor) -> None:
    """What is submitted next starts together."""
    executor.submit(lambda: time.sleep(0.3))


async def test_what_loras_cost_is_counted_and_merged_they_cost_nothing(
    tiny_store: Path, tmp_path: Path, executor: Executor
) -> None:
    save_lora_for(tmp_path, "ink", tiny_store / "tiny-sd", seed=1, rank=64)
    part = load_part(tiny_store, "tiny-sd", "denoiser", torch.device("cpu"))
    combination, given = await Adapters(part, tmp_path).load(uses_of((("ink", 0.8),))), embeddings(tiny_store, part)

    def ticket_of(held: Any, executor: Executor = executor) -> Ticket:
        future, ticket = executor.submit(partial(denoised, part, held, given))
        future.result(60)
        return ticket

    unknown = ticket_of(combination)
    assert unknown.adapted_s == pytest.approx(1.1 * unknown.bare_s)
    plain = [ticket_of(None) for _ in range(3)]
    assert {ticket.adapted_s for ticket in plain} == {0.0}
    beside = [ticket_of(combination) for _ in range(3)][-1]
    assert min(beside.adapted_s, beside.bare_s) > 0
    assert beside.adapted_s != pytest.approx(1.1 * beside.bare_s, rel=1e-6)  # measured: on a busy machine even less
    alone = ticket_of(InWeights(part, combination))
    assert alone.adapted_s == pytest.approx(alone.bare_s)
    probing = Executor(max_batch_rows=4, probes=True)
    ticket_of(combination, probing)
    until_idle, _ = probing.submit(lambda: time.sleep(0.1))
    until_idle.result(60)
    while probing._batches.has_probes:
        await asyncio.sleep(0.01)
    measured = ticket_of(combination, probing)
    assert measured.adapted_s != pytest.approx(1.1 * measured.bare_s, rel=1e-6)
    probing.close()


class Layers(torch.nn.Module):
    """One layer of each kind that can be merged, and one that cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.long = torch.nn.Conv1d(4, 8, 3, padding=1)
        self.bare = torch.nn.Linear(8, 8, bias=False)
        self.linear = torch.nn.Linear(8, 8)
        self.small = torch.nn.Conv2d(8, 6, 1)
        self.wide = torch.nn.Conv2d(6, 6, (1, 3), padding=(0, 1))
        self.deep = torch.nn.Conv3d(6, 4, (1, 3, 3), padding=(0, 1, 1))
        self.untouched = torch.nn.Linear(8, 8)

    def forward(self, sample: torch.Tensor) -> tuple[torch.Tensor]:
        hidden = self.linear(self.bare(self.long(sample)))
        flat = self.wide(self.small(hidden[:, :, None]))
        return (self.untouched(self.deep(flat[:, :, None])[:, :, 0, 0]),)


NAMES = [name for name, _ in Layers().named_children() if name != "untouched"]


def peft_copy(network: torch.nn.Module, *, biases: bool = False) -> Any:
    """With two LoRAs and a DoRA, all random, as PEFT injects them; `biases`: with one LoRA that has some."""
    injected = copy.deepcopy(network)
    for name in ("biased",) if biases else ("one", "two", "dora"):
        targets = [each for each in NAMES if not biases or each != "bare"]
        config = LoraConfig(r=2, lora_alpha=3, target_modules=targets, use_dora=name == "dora", lora_bias=biases)
        inject_adapter_in_model(config, injected, adapter_name=name)
    for name, parameter in injected.named_parameters():
        if "lora_magnitude_vector" in name:
            parameter.data *= 0.5 + torch.rand_like(parameter)
        elif "lora_" in name:
            parameter.data = torch.randn_like(parameter) * 0.3
    return injected


def lora_of(injected: Any, name: str) -> Lora:
    deltas = {}
    for module, layer in injected.named_children():
        if isinstance(layer, LoraLayer) and name in layer.lora_A:
            down: Any = layer.lora_A[name]
            up: Any = layer.lora_B[name]
            lengths: Any = layer.lora_magnitude_vector
            magnitude = lengths[name].weight if name in lengths else None
            deltas[module] = Delta(down.weight, up.weight, up.bias, 3.0, 2, magnitude)
    return Lora(name, {"net": deltas}, frozenset())


def scaled(injected: Any, network: torch.nn.Module, uses: Uses) -> tuple[Scaled, ...]:
    loras = [(lora_of(injected, name), scale) for name, scale in uses]
    return tuple(Scaled(lora, scale, factors_of(lora, {"net": network}, scale)) for lora, scale in loras)


@pytest.mark.parametrize("element_type", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "uses",
    [
        (("one", 0.7),),
        (("one", -1.0), ("two", 0.5)),
        (("dora", 0.7),),
        (("one", 1.0), ("dora", 0.5), ("two", -0.5)),
        (("biased", 0.7),),
    ],
)
@torch.no_grad()
def test_every_kind_of_layer_gets_the_weights_that_peft_gives_it(element_type: torch.dtype, uses: Uses) -> None:
    torch.manual_seed(1)
    network = Layers().to(element_type)
    injected = peft_copy(network, biases=uses[0][0] == "biased")
    loras = scaled(injected, network, uses)
    tree: Any = merge({"net": network}, loras)["net"].tree
    for layer in injected.modules():
        if isinstance(layer, LoraLayer):
            layer.set_adapter([name for name, _ in uses])
            for name, scale in uses:
                layer.set_scale(name, scale)
            layer.merge()
    tolerance = 0.0 if "dora" not in dict(uses) else 1e-6 if element_type is torch.float32 else 2e-2
    for name, layer in injected.named_children():
        merged, plain = getattr(tree, name), getattr(layer, "base_layer", layer)
        assert torch.allclose(merged.weight, plain.weight, rtol=tolerance, atol=tolerance), name
        assert merged.weight.stride() == getattr(network, name).weight.stride()
        assert plain.bias is None or torch.equal(merged.bias, plain.bias)


@torch.inference_mode()
def test_a_merged_layer_answers_as_with_the_loras_beside_it_whatever_they_bring() -> None:
    """Biases where the layer has none, and below a magnitude: PEFT has no layers that fuse so."""
    torch.manual_seed(2)
    network = Layers()
    injected = peft_copy(network)
    first, dora, last = scaled(injected, network, (("one", 0.7), ("dora", 0.5), ("two", -0.4)))
    for lora in (first.lora, last.lora):
        for module, delta in lora.networks["net"].items():
            biased = Delta(delta.down, delta.up, torch.randn(len(delta.up)), delta.alpha, delta.divisor)
            lora.networks["net"][module] = biased  # type: ignore[index]  # it is a dict
    loras, entry = (first, dora, last), Entry.of(network, "forward", "net", ())
    adapted = AdaptedNetwork(network)
    adapted.adapt(NAMES)
    answers = []
    for adapter in (Mix(adapted, "net", loras), merge({"net": network}, loras)["net"]):
        with carrying(adapter):
            answers.append(run_batch([Forward(entry, (torch.ones(1, 4, 8),), {})])[0][0])
    assert relative(answers[1], answers[0]) <= 1e-5
    assert relative(answers[0], network(torch.ones(1, 4, 8))[0]) > 0.1


def test_only_what_loras_change_takes_room() -> None:
    network = Layers()
    loras = scaled(peft_copy(network), network, (("one", 1.0),))
    tree: Any = merge({"net": network}, loras)["net"].tree
    own = {name: each for name, each in tree.named_parameters() if each is not network.get_parameter(name)}
    assert sorted(own) == sorted(f"{name}.weight" for name in NAMES)
    assert merged_bytes({"net": network}, loras) == sum(each.nbytes for each in own.values())
    biased = scaled(peft_copy(network, biases=True), network, (("biased", 1.0),))
    tree = merge({"net": network}, biased)["net"].tree
    own = {name: each for name, each in tree.named_parameters() if each is not network.get_parameter(name)}
    assert merged_bytes({"net": network}, biased) == sum(each.nbytes for each in own.values())


def test_convolutions_in_groups_are_not_merged() -> None:
    network = torch.nn.ModuleDict({"grouped": torch.nn.Conv2d(6, 6, 1, groups=2)})
    delta = Delta(torch.ones(2, 6, 1, 1), torch.ones(6, 1, 1, 1), None, 1.0, 1.0)
    assert merged_bytes({"net": network}, [Scaled(Lora("one", {"net": {"grouped": delta}}, frozenset()), 1.0)]) is None
