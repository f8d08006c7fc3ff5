"""Stand-ins pass for the networks they stand for, and pass on what is meant for them."""

import copy
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel

from darkroom.models.executor import Executor
from darkroom.models.loader import load_part
from darkroom.models.standins import Absent, Batched, RowLists
from tests.tiny_models import TINY_MODELS, save_tiny_model

CPU = torch.device("cpu")


def dtypes(network: torch.nn.Module) -> set[torch.dtype]:
    return {parameter.dtype for parameter in network.parameters()}


@pytest.mark.parametrize("stage", ["denoiser", "vae"])
def test_a_stand_in_passes_for_its_network(tiny_store: Path, stage: str) -> None:
    part = load_part(tiny_store, "tiny-sd", stage, CPU)
    for name, kind in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL)):
        stand_in = getattr(part.pipeline, name)
        assert type(stand_in) in (Batched, Absent)
        assert isinstance(stand_in, kind)
        assert isinstance(stand_in, torch.nn.Module)
        assert stand_in.config is part.networks[name].config
        assert part.pipeline.config[name] == ("diffusers", kind.__name__)
        copied = copy.copy(stand_in)
        assert type(copied) is type(stand_in)
        assert copied.config is stand_in.config
    assert part.pipeline.device == CPU
    assert part.pipeline.components["unet"] is part.pipeline.unet


def test_to_reaches_the_network_that_is_here_and_no_other(tiny_store: Path) -> None:
    part = load_part(tiny_store, "tiny-sd", "vae", CPU)
    part.pipeline.to(torch.float64)
    assert dtypes(part.networks["vae"]) == {torch.float64}
    assert {parameter.device.type for parameter in part.networks["unet"].parameters()} == {"meta"}


def test_upcasting_a_vae_in_half_precision_reaches_it(tiny_store: Path) -> None:
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_store / "tiny-sdxl")
    real = pipeline.vae.half()
    pipeline.vae = Batched(real, "vae", methods=("decode",))
    with pytest.warns(FutureWarning, match="upcast_vae"):
        pipeline.upcast_vae()
    assert real.dtype is torch.float32


def test_a_vae_that_asks_for_it_is_loaded_in_single_precision(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, "tiny-sdxl")
    for name in ("vae", "unet"):
        half = DiffusionPipeline.from_pretrained(tmp_path / "tiny-sdxl").components[name].half()
        half.save_pretrained(tmp_path / "tiny-sdxl" / name)
    elsewhere = torch.device("meta")  # any but the CPU, where everything is in single precision
    assert dtypes(load_part(tmp_path, "tiny-sdxl", "vae", elsewhere).networks["vae"]) == {torch.float32}
    assert dtypes(load_part(tmp_path, "tiny-sdxl", "denoiser", elsewhere).networks["unet"]) == {torch.float16}


@pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")
@pytest.mark.parametrize("model_id", TINY_MODELS)
def test_an_absent_network_holds_no_memory(tiny_store: Path, model_id: str) -> None:
    part = load_part(tiny_store, model_id, "vae", CPU)
    for name in part.denoiser_names:
        assert isinstance(part.pipeline.components[name], type(part.networks[name]))
        assert {tensor.device.type for tensor in part.networks[name].parameters()} == {"meta"}


class Summing(torch.nn.Module):
    """Adds to each row of `x` the sum of its text; notes the lengths of the texts it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.lengths: list[list[int]] = []

    def forward(
        self, x: Sequence[torch.Tensor], scale: torch.Tensor, texts: Sequence[torch.Tensor], *, return_dict: bool = True
    ) -> tuple[list[torch.Tensor]]:
        assert not return_dict
        self.lengths.append([len(text) for text in texts])
        return ([row * s + text.sum() for row, s, text in zip(x, scale, texts, strict=True)],)


def run_lists(network: torch.nn.Module, value: float, lengths: Sequence[int]) -> list[torch.Tensor]:
    x = [torch.full((2, 1), value + i) for i in range(len(lengths))]
    texts = [torch.full((length, 3), 0.5) for length in lengths]
    answer: list[torch.Tensor] = network(x, torch.ones(len(lengths)), texts, return_dict=False)[0]
    return answer


def test_rows_in_lists_share_batches_and_come_back_in_lists() -> None:
    network, executor = Summing(), Executor(max_batch_rows=16)
    stand_in = Batched(network, "summing", row_lists={"x": 1, "texts": 4})
    wanted = ((0.0, (3, 2)), (10.0, (4, 1)), (20.0, (5, 5)))
    runs = executor.submit(lambda: [executor.submit(partial(run_lists, stand_in, *call))[0] for call in wanted])
    for (value, lengths), future in zip(wanted, runs[0].result(10), strict=True):
        answer = future.result(10)
        assert isinstance(answer, list)
        expected = [torch.full((2, 1), value + i + 1.5 * length) for i, length in enumerate(lengths)]
        assert all(torch.equal(*pair) for pair in zip(answer, expected, strict=True))
    executor.close()
    assert sorted(network.lengths) == [[3, 2, 4, 1], [5, 5]]  # the third is padded to eight


def test_packing_pads_to_a_multiple() -> None:
    packed = RowLists(Summing(), {"texts": 4}).pack({"texts": [torch.ones(5, 2), torch.ones(2, 2)], "scale": 3})
    assert packed["texts"].shape == (2, 8, 2)
    assert packed["texts"].sum().item() == 14
    assert packed["texts_lengths"].tolist() == [5, 2]
    assert packed["scale"] == 3
