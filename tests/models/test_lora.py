"""LoRA files of strangers: what does not fit is refused by its place in the request, what is broken by its fault."""

import contextlib
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from darkroom.errors import DarkroomError, InvalidField, LoraNotFound, UnusableLora
from darkroom.models.adapted import AdaptedNetwork, Mix, Scaled
from darkroom.models.adapters import Adapters
from darkroom.models.forwards import Entry, Forward, carrying, run_batch
from darkroom.models.loader import Part, load_part
from darkroom.models.lora import Delta, Lora
from darkroom.wire.tasks import LoraUse
from tests.tiny_loras import diffusers_names, save_lora, save_lora_for

NAME = "unet.down_blocks.0.resnets.0.conv1"
LINEAR = "unet.down_blocks.0.resnets.0.time_emb_proj"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def part(tiny_store: Path) -> Part:
    return load_part(tiny_store, "tiny-sd", "denoiser", torch.device("cpu"))


def good() -> Tensors:
    """A LoRA over one convolution and one linear layer."""
    return {
        f"{NAME}.lora_A.weight": torch.ones(2, 32, 3, 3),
        f"{NAME}.lora_B.weight": torch.ones(32, 2, 1, 1),
        f"{LINEAR}.lora_A.weight": torch.ones(2, 128),
        f"{LINEAR}.lora_B.weight": torch.ones(32, 2),
    }


async def refusal(part: Part, store: Path, *uses: LoraUse) -> DarkroomError:
    with pytest.raises(DarkroomError) as caught:
        await Adapters(part, store).load(uses)
    return caught.value


async def test_the_good_file_is_loaded(part: Part, tmp_path: Path) -> None:
    save_lora(tmp_path, "good", good())
    combination = await Adapters(part, tmp_path).load([LoraUse("good", 1.0)])
    assert list(combination.stand_ins()) == ["unet"]


MISFITS: dict[str, Callable[[Tensors], Tensors]] = {
    "another module": lambda t: t | diffusers_names("unet", {"nowhere": (torch.ones(2, 128), torch.ones(32, 2))}),
    "a module that is no layer": lambda t: (
        t | {"unet.mid_block.lora_A.weight": torch.ones(1, 1), "unet.mid_block.lora_B.weight": torch.ones(1, 1)}
    ),
    "another network": lambda t: t | diffusers_names("transformer", {"a": (torch.ones(1, 1), torch.ones(1, 1))}),
    "another width in": lambda t: t | {f"{LINEAR}.lora_A.weight": torch.ones(2, 129)},
    "another width out": lambda t: t | {f"{LINEAR}.lora_B.weight": torch.ones(33, 2)},
    "a kernel of another size": lambda t: t | {f"{NAME}.lora_A.weight": torch.ones(2, 32, 1, 1)},
    "two ranks": lambda t: t | {f"{LINEAR}.lora_A.weight": torch.ones(3, 128)},
    "no rank": lambda t: (
        t | {f"{LINEAR}.lora_A.weight": torch.ones(0, 128), f"{LINEAR}.lora_B.weight": torch.ones(32, 0)}
    ),
    "no dimensions": lambda t: t | {f"{LINEAR}.lora_A.weight": torch.tensor(1.0)},
    "a bias of another width": lambda t: t | {f"{LINEAR}.lora_B.bias": torch.ones(33)},
}


@pytest.mark.parametrize("change", MISFITS)
async def test_a_lora_for_another_architecture_is_refused_by_its_place(part: Part, tmp_path: Path, change: str) -> None:
    save_lora(tmp_path, "good", good())
    save_lora(tmp_path, "misfit", MISFITS[change](good()))
    error = await refusal(part, tmp_path, LoraUse("good", 1.0), LoraUse("misfit", 1.0))
    assert isinstance(error, InvalidField)
    assert error.facts["field"] == "loras[1]"


async def test_a_lora_of_another_base_is_refused_by_the_name_of_the_base(
    part: Part, tiny_store: Path, tmp_path: Path
) -> None:
    save_lora_for(tmp_path, "ink", tiny_store / "tiny-sdxl", seed=1)
    error = await refusal(part, tmp_path, LoraUse("ink", 1.0))
    assert isinstance(error, InvalidField)
    assert "'tiny-sdxl', not 'tiny-sd'" in error.message
    (tmp_path / "ink" / "darkroom.json").unlink()
    error = await refusal(part, tmp_path, LoraUse("ink", 1.0))
    assert isinstance(error, InvalidField)
    assert "unet." in error.message


BROKEN: dict[str, Callable[[Tensors], Tensors]] = {
    "not a number": lambda t: t | {f"{LINEAR}.lora_B.weight": torch.full((32, 2), math.nan)},
    "infinite": lambda t: t | {f"{LINEAR}.lora_A.weight": torch.full((2, 128), -math.inf)},
    "whole numbers": lambda t: t | {f"{LINEAR}.lora_A.weight": torch.ones(2, 128, dtype=torch.int64)},
    "one factor": lambda t: {name: tensor for name, tensor in t.items() if name != f"{LINEAR}.lora_A.weight"},
    "another tensor": lambda t: t | {"unet.down_blocks.0.resnets.0.norm1.weight": torch.ones(32)},
    "no network": lambda t: t | {"lora_A": torch.ones(2)},
    "a strange name": lambda t: t | {"unet.a b.lora_A.weight": torch.ones(2)},
    "kohya without up": lambda _: {"lora_unet_mid_block_x.lora_down.weight": torch.ones(2, 2)},
    "a negative alpha": lambda t: t | {"unet.x.alpha": torch.tensor(-1.0)},
    "two alphas": lambda t: t | {"unet.x.alpha": torch.ones(2)},
    "kohya's alpha alone": lambda _: {"lora_unet_mid_block_x.alpha": torch.tensor(1.0)},
}


@pytest.mark.parametrize("change", BROKEN)
async def test_tensors_that_are_no_lora_are_refused(part: Part, tmp_path: Path, change: str) -> None:
    save_lora(tmp_path, "broken", BROKEN[change](good()))
    error = await refusal(part, tmp_path, LoraUse("broken", 1.0))
    assert isinstance(error, UnusableLora)
    assert "loras[0]" in error.message


KINDS = {"LoKr": "lokr_w1", "LoHa": "hada_w1_a", "Control-LoRA": "lora_controlnet"}


@pytest.mark.parametrize("kind", KINDS)
async def test_kinds_that_are_not_supported_are_refused_by_name(part: Part, tmp_path: Path, kind: str) -> None:
    name = f"{LINEAR}.{KINDS[kind]}"
    save_lora(tmp_path, "other", good() | {name: torch.ones(2, 2)})
    error = await refusal(part, tmp_path, LoraUse("other", 1.0))
    assert isinstance(error, UnusableLora)
    assert f"not supported, {kind}: it has a tensor {name}" in error.message


METADATA = [
    "{",
    "[]",
    "[" * 100_000,
    '{"unet.lora_alpha": "4"}',
    '{"unet.lora_alpha": NaN}',
    '{"unet.lora_alpha": 1e999}',
    '{"unet.alpha_pattern": [1]}',
    '{"unet.alpha_pattern": {"conv1": null}}',
    '{"unet.use_dora": true}',
]


@pytest.mark.parametrize("said", METADATA)
async def test_metadata_that_is_nonsense_is_refused(part: Part, tmp_path: Path, said: str) -> None:
    save_lora(tmp_path, "broken", good(), metadata={"lora_adapter_metadata": said})
    assert isinstance(await refusal(part, tmp_path, LoraUse("broken", 1.0)), UnusableLora)


FILES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "short": lambda content: content[:5],
    "without its end": lambda content: content[:-1],
    "with more at its end": lambda content: content + b"\0",
    "a header longer than the file": lambda content: (1 << 40).to_bytes(8, "little") + content[8:],
    "a header of another length": lambda content: (40).to_bytes(8, "little") + content[8:],
    "a header that is no JSON": lambda content: content[:8] + b"[" * 200 + content[208:],
    "another format": lambda _: b"PK\3\4" + bytes(1000),
    "offsets outside": lambda content: content.replace(b'"data_offsets":[', b'"data_offsets":[9', 1),
}


@pytest.mark.parametrize("spoil", FILES)
async def test_a_file_that_is_no_safetensors_is_refused(part: Part, tmp_path: Path, spoil: str) -> None:
    path = save_lora(tmp_path, "broken", good())
    path.write_bytes(FILES[spoil](save(good())))
    assert isinstance(await refusal(part, tmp_path, LoraUse("broken", 1.0)), UnusableLora)


async def test_a_file_larger_than_there_is_room_is_not_read(part: Part, tmp_path: Path) -> None:
    path = save_lora(tmp_path, "huge", good())
    with path.open("r+b") as file:
        file.truncate(1 << 40)
    assert "bytes" in (await refusal(part, tmp_path, LoraUse("huge", 1.0))).message


async def test_what_is_not_there_is_not_found(part: Part, tiny_store: Path, tmp_path: Path) -> None:
    save_lora(tmp_path / "outside", "ink", good())
    store = tmp_path / "store"
    (store / "empty").mkdir(parents=True)
    (store / "link").symlink_to(tmp_path / "outside" / "ink")
    for lora_id in ("nowhere", "empty", "link", "../outside/ink", "..", ".", "a" * 300):
        error = await refusal(part, store, LoraUse(lora_id, 1.0))
        assert isinstance(error, LoraNotFound)
        assert error.facts["field"] == "loras[0].lora_id"
    assert isinstance(await refusal(part, tiny_store, LoraUse("tiny-sd", 1.0)), LoraNotFound)


async def test_weights_that_lead_out_of_the_store_are_refused(part: Part, tmp_path: Path) -> None:
    outside = save_lora(tmp_path / "outside", "ink", good())
    folder = tmp_path / "store" / "ink"
    folder.mkdir(parents=True)
    (folder / "a.safetensors").symlink_to(outside)
    assert isinstance(await refusal(part, tmp_path / "store", LoraUse("ink", 1.0)), UnusableLora)
    (folder / "b.safetensors").write_bytes(outside.read_bytes())
    assert "2 files" in (await refusal(part, tmp_path / "store", LoraUse("ink", 1.0))).message


async def test_the_same_lora_twice_is_refused(part: Part, tmp_path: Path) -> None:
    error = await refusal(part, tmp_path, LoraUse("a", 1.0), LoraUse("a", 0.5))
    assert isinstance(error, InvalidField)
    assert error.facts["field"] == "loras[1].lora_id"


async def test_a_refused_lora_is_tried_again(part: Part, tmp_path: Path) -> None:
    path = save_lora(tmp_path, "ink", good())
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    adapters = Adapters(part, tmp_path)
    with pytest.raises(UnusableLora):
        await adapters.load([LoraUse("ink", 1.0)])
    path.write_bytes(whole)
    assert list((await adapters.load([LoraUse("ink", 1.0)])).stand_ins()) == ["unet"]


class Folding(torch.nn.Module):
    """Hands its layer two rows for each of its own, as a video network does with frames."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 4, bias=False)

    def forward(self, sample: torch.Tensor) -> tuple[torch.Tensor]:
        folded = self.layer(sample.reshape(2 * len(sample), 4))
        return (folded.reshape(sample.shape),)


@torch.inference_mode()
def test_a_network_that_folds_rows_runs_loras_apart_and_says_so_in_the_key() -> None:
    network = Folding()
    adapted, entry = AdaptedNetwork(network), Entry.of(network, "forward", "folding", ())
    deltas = [Delta(torch.randn(1, 4), torch.randn(4, 1), None, 1.0, 1.0) for _ in range(2)]
    mixes = [
        Mix(adapted, "net", (Scaled(Lora(str(i), {"net": {"layer": d}}, frozenset()), 1.0),))
        for i, d in enumerate(deltas)
    ]
    adapted.adapt(["layer"])
    samples = torch.randn(4, 1, 8)
    carried = [mixes[0], None, mixes[1], mixes[0]]

    def calls() -> list[Forward]:
        made = []
        for row, mix in zip(samples, carried, strict=True):
            with carrying(mix) if mix else contextlib.nullcontext():
                made.append(Forward(entry, (row,), {}))
        return made

    assert len({call.key for call in calls()}) == 1
    answers = [answer for (answer,) in run_batch(calls())]
    for sample, mix, answer in zip(samples, carried, answers, strict=True):
        weight = network.layer.weight
        if mix:
            delta = mix.loras[0].lora.networks["net"]["layer"]
            weight = weight + delta.up @ delta.down
        assert torch.allclose(answer, (sample.reshape(2, 4) @ weight.T).reshape(1, 8), atol=1e-5)
    assert len({call.key for call in calls()}) == 3
    assert calls()[0].key == calls()[3].key


async def test_darkroom_json_that_cannot_be_read_is_refused(part: Part, tmp_path: Path) -> None:
    path = save_lora(tmp_path, "ink", good())
    for content in (b"{", b"\xff", b"[" * 100_000):
        (path.parent / "darkroom.json").write_bytes(content)
        assert isinstance(await refusal(part, tmp_path, LoraUse("ink", 1.0)), UnusableLora)
    (path.parent / "darkroom.json").write_text(json.dumps({"base_model": ["tiny-sd"]}))
    assert isinstance(await refusal(part, tmp_path, LoraUse("ink", 1.0)), InvalidField)
