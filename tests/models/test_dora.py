"""DoRA against PEFT's own layers, and what is refused of files with magnitudes. Whole models: test_adapters.py."""

import asyncio
import contextlib
import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer

from darkroom.errors import InvalidField, UnusableLora
from darkroom.models.adapted import AdaptedNetwork, Mix, Scaled
from darkroom.models.adapters import Adapters
from darkroom.models.dora import factors_of
from darkroom.models.forwards import Entry, Forward, carrying, run_batch
from darkroom.models.loader import Part, load_part
from darkroom.models.lora import KEPT_SCALES, Delta, Lora, read_lora
from darkroom.models.lora_file import Refused
from darkroom.wire.tasks import LoraUse
from tests.tiny_loras import (
    diffusers_names,
    dora_names,
    factors,
    is_any,
    kohya_names,
    magnitudes,
    save_lora,
    save_lora_for,
)

CONV = "unet.down_blocks.0.resnets.0.conv1"
LINEAR = "unet.down_blocks.0.resnets.0.time_emb_proj"
KOHYA = "lora_unet_down_blocks_0_resnets_0_time_emb_proj"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def part(tiny_store: Path) -> Part:
    return load_part(tiny_store, "tiny-sd", "denoiser", torch.device("cpu"))


class Layers(torch.nn.Module):
    """One layer of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.long = torch.nn.Conv1d(4, 6, 3, padding=1)
        self.bare = torch.nn.Linear(8, 8, bias=False)
        self.linear = torch.nn.Linear(8, 8)
        self.grouped = torch.nn.Conv2d(6, 6, 1, groups=2)
        self.deep = torch.nn.Conv3d(6, 4, (1, 1, 3), padding=(0, 0, 1))

    def forward(self, sample: torch.Tensor) -> tuple[torch.Tensor]:
        hidden = self.linear(self.bare(self.long(sample)))
        return (self.deep(self.grouped(hidden[:, :, None])[:, :, None]),)


def peft_copy(network: torch.nn.Module) -> Any:
    """With a DoRA and a plain LoRA, both random, as PEFT injects them."""
    injected = copy.deepcopy(network)
    for name in ("dora", "plain"):
        targets = [name for name, _ in network.named_children()]
        config = LoraConfig(r=2, lora_alpha=3, target_modules=targets, use_dora=name == "dora")
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
        magnitude = layer.lora_magnitude_vector[name].weight if name in layer.lora_magnitude_vector else None
        deltas[module] = Delta(layer.lora_A[name].weight, layer.lora_B[name].weight, None, 3.0, 2, magnitude)
    return Lora(name, {"net": deltas}, frozenset())


Uses = tuple[tuple[str, float], ...]
REQUESTS: tuple[Uses, ...] = (
    (("dora", 0.7),),
    (("plain", 1.0),),
    (),
    (("dora", -1.0), ("plain", 0.5)),
    (("plain", 0.5), ("dora", 0.0)),
)


def peft_answer(injected: Any, sample: torch.Tensor, uses: Uses) -> torch.Tensor:
    for layer in injected.modules():
        if isinstance(layer, LoraLayer):
            layer.set_adapter([name for name, _ in uses])
            for name, scale in uses:
                layer.set_scale(name, scale)
    answer: torch.Tensor = injected(sample)[0]
    return answer


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")  # of PEFT, as the next one
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
@pytest.mark.parametrize("element_type", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_every_kind_of_layer_answers_as_in_peft_alone_and_in_one_batch(element_type: torch.dtype) -> None:
    torch.manual_seed(1)
    network = Layers().to(element_type)
    injected = peft_copy(network)
    loras = {name: lora_of(injected, name) for name in ("dora", "plain")}
    adapted, entry = AdaptedNetwork(network), Entry.of(network, "forward", "layers", ())
    adapted.adapt(name for name, _ in network.named_children())
    samples = torch.randn(len(REQUESTS), 1, 4, 8, dtype=element_type)

    def call(sample: torch.Tensor, uses: Uses) -> Forward:
        scaled = [Scaled(loras[name], scale, factors_of(loras[name], {"net": network}, scale)) for name, scale in uses]
        with carrying(Mix(adapted, "net", tuple(scaled))) if uses else contextlib.nullcontext():
            return Forward(entry, (sample,), {})

    calls = [call(sample, uses) for sample, uses in zip(samples, REQUESTS, strict=True)]
    expected = [peft_answer(injected, sample, uses) for sample, uses in zip(samples, REQUESTS, strict=True)]
    for each, answer in zip(calls, expected, strict=True):
        assert torch.equal(run_batch([each])[0][0], answer)
    assert len({each.key for each in calls}) == 1
    for (found,), answer in zip(run_batch(calls), expected, strict=True):
        tolerance = 1e-5 if element_type == torch.float32 else 2e-2
        assert float((found - answer).norm() / answer.norm()) <= tolerance
    assert adapted.is_mixable


def good() -> Tensors:
    return {
        f"{CONV}.lora_A.weight": torch.ones(2, 32, 3, 3),
        f"{CONV}.lora_B.weight": torch.ones(32, 2, 1, 1),
        f"{CONV}.lora_magnitude_vector": torch.ones(1, 32, 1, 1),
        f"{LINEAR}.lora_A.weight": torch.ones(2, 128),
        f"{LINEAR}.lora_B.weight": torch.ones(32, 2),
        f"{LINEAR}.lora_magnitude_vector": torch.ones(32),
    }


def kohya(magnitude: torch.Tensor) -> Tensors:
    return {
        f"{KOHYA}.lora_down.weight": torch.ones(2, 128),
        f"{KOHYA}.lora_up.weight": torch.ones(32, 2),
        f"{KOHYA}.dora_scale": magnitude,
    }


async def test_the_good_files_are_loaded(part: Part, tmp_path: Path) -> None:
    for name, tensors in (("good", good()), ("kohya", kohya(torch.ones(32, 1)))):
        save_lora(tmp_path, name, tensors)
        assert list((await Adapters(part, tmp_path).load([LoraUse(name, 1.0)])).stand_ins()) == ["unet"]


REFUSED: dict[str, tuple[Callable[[Tensors], Tensors], type[Exception], str]] = {
    "another width": (
        lambda t: t | {f"{LINEAR}.lora_magnitude_vector": torch.ones(33)},
        InvalidField,
        f"{LINEAR}.lora_magnitude_vector",
    ),
    "a row": (
        lambda t: t | {f"{LINEAR}.lora_magnitude_vector": torch.ones(1, 32)},
        InvalidField,
        f"{LINEAR}.lora_magnitude_vector",
    ),
    "flat for a convolution": (
        lambda t: t | {f"{CONV}.lora_magnitude_vector": torch.ones(32)},
        InvalidField,
        f"{CONV}.lora_magnitude_vector",
    ),
    "not a number": (
        lambda t: t | {f"{LINEAR}.lora_magnitude_vector": torch.full((32,), math.nan)},
        UnusableLora,
        f"{LINEAR}.lora_magnitude_vector",
    ),
    "without factors": (
        lambda t: t | {"unet.conv_in.lora_magnitude_vector": torch.ones(1, 32, 1, 1)},
        UnusableLora,
        "unet.conv_in.lora_magnitude_vector",
    ),
    "for some modules": (
        lambda t: {name: each for name, each in t.items() if name != f"{CONV}.lora_magnitude_vector"},
        UnusableLora,
        f"none for {CONV}",
    ),
    "with a bias": (lambda t: t | {f"{LINEAR}.lora_B.bias": torch.ones(32)}, UnusableLora, f"{LINEAR}.lora_B.bias"),
    "twice": (lambda t: t | {f"{LINEAR}.dora_scale": torch.ones(32)}, UnusableLora, "two magnitudes"),
    "kohya's, another width": (lambda _: kohya(torch.ones(33, 1)), InvalidField, f"{LINEAR}.lora_magnitude_vector"),
    "kohya's, for inputs": (lambda _: kohya(torch.ones(1, 128)), UnusableLora, f"{KOHYA}.dora_scale"),
    "kohya's, one number": (lambda _: kohya(torch.tensor(1.0)), UnusableLora, f"{KOHYA}.dora_scale"),
    "kohya's, alone": (lambda _: {f"{KOHYA}.dora_scale": torch.ones(32, 1)}, UnusableLora, f"{KOHYA}.dora_scale"),
    "kohya's, without factors": (
        lambda _: kohya(torch.ones(32, 1)) | {"lora_unet_conv_in.dora_scale": torch.ones(32, 1, 1, 1)},
        UnusableLora,
        "lora_unet_conv_in.dora_scale",
    ),
}


@pytest.mark.parametrize("change", REFUSED)
async def test_magnitudes_that_cannot_be_applied_are_refused_by_name(part: Part, tmp_path: Path, change: str) -> None:
    spoil, kind, named = REFUSED[change]
    save_lora(tmp_path, "broken", spoil(good()))
    with pytest.raises(kind) as caught:
        await Adapters(part, tmp_path).load([LoraUse("broken", 1.0)])
    assert named in str(caught.value)


@pytest.mark.parametrize("said", [True, False])
async def test_metadata_that_contradicts_the_tensors_is_refused(part: Part, tmp_path: Path, *, said: bool) -> None:
    tensors = {name: each for name, each in good().items() if not said or "magnitude" not in name}
    metadata = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 2, "unet.use_dora": said})}
    save_lora(tmp_path, "broken", tensors, metadata=metadata)
    with pytest.raises(UnusableLora, match=f"use_dora is {said}"):
        await Adapters(part, tmp_path).load([LoraUse("broken", 1.0)])


def check_equal(part: Part, store: Path, *lora_ids: str) -> None:
    """They are the same once they are loaded."""
    first, *others = (read_lora(part, store, lora_id, max_bytes=1 << 30).networks for lora_id in lora_ids)
    assert any(delta.magnitude is not None for deltas in first.values() for delta in deltas.values())
    for other in others:
        assert {name: set(deltas) for name, deltas in first.items()} == {n: set(deltas) for n, deltas in other.items()}
        for name, deltas in first.items():
            for module, delta in deltas.items():
                twin = other[name][module]
                assert torch.equal(delta.down, twin.down)
                assert torch.equal(delta.up, twin.up)
                assert delta.magnitude is not None
                assert twin.magnitude is not None
                assert torch.equal(delta.magnitude, twin.magnitude)
                assert delta.scaling(0.7) == twin.scaling(0.7)


@pytest.mark.parametrize(
    ("role", "name", "inside"), [("denoiser", "unet", ""), ("encoder", "text_encoder", "text_model.")]
)
def test_the_magnitudes_of_kohya_are_those_of_peft(
    tiny_store: Path, tmp_path: Path, role: str, name: str, inside: str
) -> None:
    part = load_part(tiny_store, "tiny-sd", role, torch.device("cpu"))
    network = part.networks[name]
    pairs = {inside + module: pair for module, pair in factors(network, is_any, rank=4, seed=3).items()}
    own = {module.removeprefix(inside): pair for module, pair in pairs.items()}
    lengths = {inside + module: each for module, each in magnitudes(network, own, seed=4).items()}
    said = {f"{name}.lora_alpha": 2.0, f"{name}.r": 4, f"{name}.use_dora": True}
    metadata = {"lora_adapter_metadata": json.dumps(said)}
    names = diffusers_names(name, pairs)
    save_lora(tmp_path, "peft", names | dora_names(name, lengths), metadata=metadata)
    save_lora(tmp_path, "transformers", names | dora_names(name, lengths, end=".weight"), metadata=metadata)
    kohya = kohya_names(name, pairs, alpha=2.0)
    modules = [each.removesuffix(".alpha") for each in kohya if each.endswith(".alpha")]
    columns = [each.view(-1, *[1] * (max(each.ndim, 2) - 1)) for each in lengths.values()]
    scales = {f"{module}.dora_scale": each for module, each in zip(modules, columns, strict=True)}
    save_lora(tmp_path, "kohya", kohya | scales)
    check_equal(part, tmp_path, "peft", "transformers", "kohya")


def test_the_magnitudes_of_a_joint_query_key_and_value_are_split(tiny_store: Path, tmp_path: Path) -> None:
    module, attention = "lora_unet_double_blocks_0_img_attn_qkv", "transformer.transformer_blocks.0.attn"
    tensors = {
        f"{module}.lora_down.weight": torch.randn(4, 32),
        f"{module}.lora_up.weight": torch.randn(96, 4),
        f"{module}.alpha": torch.tensor(2.0),
    }
    length = torch.rand(96, 1)
    save_lora(tmp_path, "kohya", tensors | {f"{module}.dora_scale": length})
    split = FluxPipeline.lora_state_dict(dict(tensors))
    for name, each in zip(("to_q", "to_k", "to_v"), length.flatten().chunk(3), strict=True):
        split[f"{attention}.{name}.lora_magnitude_vector"] = each
    save_lora(tmp_path, "peft", {name: each.clone() for name, each in split.items()})
    part = load_part(tiny_store, "tiny-flux", "denoiser", torch.device("cpu"))
    check_equal(part, tmp_path, "peft", "kohya")
    save_lora(tmp_path, "more", tensors | {"lora_te2_x.lora_magnitude_vector": torch.ones(32)})
    with pytest.raises(Refused, match="leaves out"):
        read_lora(part, tmp_path, "more", max_bytes=1 << 30)


async def test_factors_are_worked_out_once_for_a_scale_and_kept_for_few(
    part: Part, tiny_store: Path, tmp_path: Path
) -> None:
    save_lora_for(tmp_path, "ink", tiny_store / "tiny-sd", seed=1, dora=True)
    adapters = Adapters(part, tmp_path)
    loads = [adapters.load([LoraUse("ink", scale)]) for scale in (0.5, 0.5, 0.7)]
    first, again, other = [combination.loras[0].factors["unet"] for combination in await asyncio.gather(*loads)]
    assert first is again
    module = CONV.removeprefix("unet.")
    assert not torch.equal(first[module], other[module])
    for scale in range(KEPT_SCALES):
        (await adapters.load([LoraUse("ink", float(scale))])).release()
    kept = adapters._kept["ink"]
    assert list(kept.factors) == [float(scale) for scale in range(KEPT_SCALES)]
    held_bytes = sum(each.nbytes for found in kept.factors.values() for each in found["unet"].values())
    deltas = kept.task.result().networks["unet"].values()
    factor_bytes = sum(tensor.nbytes for delta in deltas for tensor in (delta.down, delta.up))
    magnitude_bytes = sum(delta.magnitude.nbytes for delta in deltas if delta.magnitude is not None)
    assert adapters.resident() == {"ink": factor_bytes + magnitude_bytes + held_bytes}
