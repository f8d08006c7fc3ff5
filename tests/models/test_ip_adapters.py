"""IP-Adapters beside other requests; that they draw what plain diffusers draws is among the tests of variants."""

import io
import shutil
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from darkroom.errors import InvalidField, ModelNotFound, UnusableModel
from darkroom.families import CONTROLNETS, IP_ADAPTED
from darkroom.models import controlnets, ip_adapters
from darkroom.models.adapters import Adapters
from darkroom.models.denoising import denoise
from darkroom.models.executor import Executor
from darkroom.models.ip_adapters import IpAdapters, with_ip_adapters
from darkroom.models.journal import Journal
from darkroom.models.loader import Part
from darkroom.models.program import Ticket
from darkroom.models.remote import OutsideCall, Reply
from darkroom.models.variants import UNCONDITIONED, Conditions, check_conditions, ip_prompt, read_conditions
from darkroom.wire.conditions import ConditionFiles, IpAdapterUse
from darkroom.wire.tasks import LoraUse
from tests.models.oracle import NEGATIVE, SIZE_PX, held_up
from tests.models.variant_runs import (
    CASES,
    REQUESTS,
    Elsewhere,
    load_plainly,
    part_of,
    picture,
    plain_latents,
    requested,
)
from tests.tiny.ip_adapters import PICTURE_PX, WEIGHTS, save_ip_adapter
from tests.tiny_loras import save_lora_for
from tests.tiny_models import save_tiny_model

CASE, WANTED = CASES["sd ip"], REQUESTS[0]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ip-adapters")
    for model_id in ("tiny-sd", "tiny-sdxl", "tiny-sd3", "tiny-pixart-sigma"):
        save_tiny_model(root, model_id)
    for adapter_id in ("ip-sd", "ip-sd-plus", "ip-sd3"):
        save_ip_adapter(root, adapter_id)
    return root


def test_the_tables_that_need_no_torch_name_what_can_be_loaded() -> None:
    assert set(ip_adapters._KINDS) == set(IP_ADAPTED)
    assert set(controlnets.KINDS) == set(CONTROLNETS)


def prompted(scale: float, seed: int = 21) -> Conditions:
    read = CLIPImageProcessor(size=PICTURE_PX, crop_size=PICTURE_PX)
    return Conditions(ip_prompts=(ip_prompt(read, picture(seed), scale),))


def error(found: torch.Tensor, right: torch.Tensor) -> float:
    return float((found - right).norm() / right.norm())


def test_requests_with_other_scales_share_batches_and_those_without_are_as_before(
    store: Path, executor: Executor, elsewhere: Elsewhere
) -> None:
    plain = part_of(store, "tiny-sd", "denoiser", elsewhere.send)
    task, embeddings = requested(store, CASE, WANTED, executor, plain)

    def start(part: Part, conditions: Conditions, *, alone: bool) -> Any:
        ticket = Ticket(alone=alone)
        program = partial(denoise, part, task, embeddings, Journal(ticket), conditions=conditions)
        return executor.submit(program, ticket=ticket)

    before = start(plain, UNCONDITIONED, alone=True)[0].result(60)
    part = with_ip_adapters(plain, store, ["ip-sd"], elsewhere.send)
    conditions = [prompted(0.0), prompted(0.4), prompted(1.3)]
    apart = [start(part, asked, alone=True)[0].result(60) for asked in conditions]
    assert error(apart[0], before) < 1e-5
    assert error(apart[1], before) > 1e-2
    with held_up(executor):
        together = [start(part, asked, alone=False) for asked in conditions]
        without = start(plain, UNCONDITIONED, alone=False)
    for (future, ticket), right in zip(together, apart, strict=True):
        assert error(future.result(60), right) < 1e-5
        assert ticket.batched == ticket.forwards == task.step_count
    assert torch.equal(without[0].result(60), before)
    assert without[1].batched == 0
    assert plain.denoiser.config.encoder_hid_dim_type is None


async def test_a_request_may_have_a_lora_too(store: Path, executor: Executor, elsewhere: Elsewhere) -> None:
    plain = part_of(store, "tiny-sd", "denoiser", elsewhere.send)
    part = with_ip_adapters(plain, store, ["ip-sd"], elsewhere.send)
    save_lora_for(store, "ink", store / "tiny-sd", seed=5)
    task, embeddings = requested(store, CASE, WANTED, executor, part)
    pipeline = StableDiffusionPipeline.from_pretrained(store / "tiny-sd")
    pipeline.set_progress_bar_config(disable=True)
    load_plainly(pipeline, store, replace(CASE, ip_scales=(0.7,)))
    pipeline.load_lora_weights(store / "ink", adapter_name="ink")
    pipeline.set_adapters(["ink"], [0.8])
    right = pipeline(
        WANTED.prompt,
        negative_prompt=NEGATIVE,
        num_inference_steps=WANTED.steps,
        guidance_scale=WANTED.guidance,
        generator=torch.Generator().manual_seed(WANTED.seed),
        width=SIZE_PX,
        height=SIZE_PX,
        ip_adapter_image=picture(21),
        output_type="latent",
        return_dict=False,
    )[0]
    with await Adapters(part, store).load([LoraUse("ink", 0.8)]) as combination:
        journal = Journal(Ticket(alone=True))
        program = partial(
            denoise, part, task, embeddings, journal, stand_ins=combination.stand_ins(), conditions=prompted(0.7)
        )
        found = executor.submit(program, ticket=journal.ticket)[0].result(60)
    assert torch.equal(found, right)
    without_lora = plain_latents(store, replace(CASE, ip_scales=(0.7,)), WANTED, part)
    assert error(found, without_lora) > 1e-3


async def test_parts_with_adapters_are_made_once_and_only_so_many_kept(
    store: Path, elsewhere: Elsewhere, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, adapters = part_of(store, "tiny-sd", "denoiser", elsewhere.send), IpAdapters(store, elsewhere.send)
    assert await adapters.adapted(plain, []) is plain
    first = await adapters.adapted(plain, ["ip-sd"])
    assert await adapters.adapted(plain, ["ip-sd"]) is first
    assert set(first.networks["unet"].parameters()) > set(plain.networks["unet"].parameters())
    monkeypatch.setattr(adapters, "_max_count", 2)
    for other in (["ip-sd-plus"], ["ip-sd", "ip-sd-plus"]):
        await adapters.adapted(plain, other)
    assert len(adapters.loaded) == 2
    assert await adapters.adapted(plain, ["ip-sd"]) is not first
    with pytest.raises(InvalidField, match=r"ip_adapters\[1\].ip_adapter_id repeats ip_adapters\[0\]"):
        await adapters.adapted(plain, ["ip-sd"] * 2)


def changed(store: Path, root: Path, change: Any) -> Path:
    """A store with the adapter "bad" beside the model: ip-sd, changed."""
    shutil.copytree(store / "tiny-sd", root / "tiny-sd")
    shutil.copytree(store / "ip-sd", root / "bad")
    change(root / "bad")
    return root


class Nowhere:
    """Nothing is called elsewhere."""

    def send(self, stage: str, call: OutsideCall) -> "Future[Reply]":
        raise AssertionError(stage, call)


def renamed(old: str, new: str) -> Any:
    def change(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        save_file({name.replace(old, new): value for name, value in tensors.items()}, folder / WEIGHTS)

    return change


@pytest.mark.parametrize(
    ("change", "kind", "problem"),
    [
        (lambda folder: (folder / WEIGHTS).unlink(), ModelNotFound, "bad"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b"junk"), UnusableModel, "safetensors"),
        (lambda folder: shutil.rmtree(folder / "image_encoder"), ModelNotFound, "bad"),
        (lambda folder: (folder / "image_encoder" / "config.json").write_text("[]"), UnusableModel, "image encoder"),
        (renamed("ip_adapter.", "other."), UnusableModel, "no part of an IP-Adapter"),
        (renamed("image_proj.", "ip_adapter."), UnusableModel, "lacks image_proj"),
        (renamed("to_k_ip", "to_k_lora.down"), UnusableModel, "FaceID"),
        (renamed("image_proj.proj.", "image_proj.proj.0."), UnusableModel, "FaceID"),
        (renamed("1.to_k_ip", "2.to_k_ip"), InvalidField, "do not fit this model"),
        (lambda folder: (folder / "darkroom.json").write_text('{"base_model": "other"}'), InvalidField, "other"),
    ],
)
def test_an_adapter_that_cannot_be_used_is_refused(
    store: Path, tmp_path: Path, change: Any, kind: type[Exception], problem: str
) -> None:
    root, elsewhere = changed(store, tmp_path, change), Nowhere()
    plain = part_of(store, "tiny-sd", "denoiser", elsewhere.send)
    with pytest.raises(kind, match=problem):
        with_ip_adapters(plain, root, ["bad"], elsewhere.send)


def test_adapters_of_one_request_have_the_same_image_encoder(store: Path, tmp_path: Path, elsewhere: Elsewhere) -> None:
    root = changed(store, tmp_path, Path.exists)
    shutil.copytree(store / "ip-sd", root / "ip-sd")
    (file,) = (root / "bad" / "image_encoder").glob("*.safetensors")
    save_file({name: value + 1 for name, value in load_file(file).items()}, file, {"format": "pt"})
    plain = part_of(store, "tiny-sd", "denoiser", elsewhere.send)
    with pytest.raises(InvalidField, match=r"ip_adapters\[1\] \(bad\) has another image encoder"):
        with_ip_adapters(plain, root, ["ip-sd", "bad"], elsewhere.send)
    shutil.rmtree(root / "bad" / "image_encoder")
    (root / "bad" / "image_encoder").symlink_to(root / "ip-sd" / "image_encoder")
    part = with_ip_adapters(plain, root, ["bad", "ip-sd"], elsewhere.send)
    assert part.networks["unet"] is not plain.networks["unet"]


def test_models_and_variants_that_take_no_adapter_say_so(store: Path, elsewhere: Elsewhere) -> None:
    with pytest.raises(InvalidField, match="PixArtSigmaPipeline"):
        with_ip_adapters(part_of(store, "tiny-pixart-sigma", "denoiser"), store, ["ip-sd"], elsewhere.send)
    with pytest.raises(InvalidField, match="one at most"):
        with_ip_adapters(part_of(store, "tiny-sd3", "denoiser"), store, ["ip-sd3"] * 2, elsewhere.send)
    with pytest.raises(InvalidField, match="do not fit"):
        with_ip_adapters(part_of(store, "tiny-sdxl", "denoiser"), store, ["ip-sd"], elsewhere.send)
    qwen = part_of(store, "tiny-pixart-sigma", "denoiser")
    with pytest.raises(InvalidField, match="ip_adapters cannot be used"):
        check_conditions(qwen, prompted(1.0), 5)


def test_a_prompt_picture_may_have_any_size_but_must_be_one(store: Path, elsewhere: Elsewhere) -> None:
    part = with_ip_adapters(part_of(store, "tiny-sd", "denoiser"), store, ["ip-sd"], elsewhere.send)

    def read(picture: Image.Image | None) -> Conditions:
        data = io.BytesIO(b"nothing")
        if picture:
            picture.save(data, format="PNG")
        use = IpAdapterUse(adapter_id="ip-sd", image=data.getvalue(), scale=1.0)
        return read_conditions(part, ConditionFiles(ip_adapters=(use,)), (), width_px=SIZE_PX, height_px=SIZE_PX)

    for size in ((7, 90), (800, 600)):
        assert read(Image.new("RGB", size)).ip_prompts[0].pixels.shape == (1, 3, PICTURE_PX, PICTURE_PX)
    thin, huge = Image.new("L", (4000, 1)), Image.new("1", (5000, 5000))
    for bad, problem in ((None, "a PNG"), (thin, "16 times"), (huge, "pixels")):
        with pytest.raises(InvalidField, match=rf"ip_adapters\[0\].image must .*{problem}"):
            read(bad)


def test_an_adapter_of_another_image_encoder_is_refused_at_once(store: Path, tmp_path: Path) -> None:
    def other_width(folder: Path) -> None:
        shutil.rmtree(folder / "image_encoder")
        config = CLIPVisionConfig(
            hidden_size=24, intermediate_size=8, projection_dim=16, num_hidden_layers=1, image_size=32, patch_size=8
        )
        CLIPVisionModelWithProjection(config).save_pretrained(folder / "image_encoder")

    root = changed(store, tmp_path, other_width)
    with pytest.raises(UnusableModel, match="does not fit its own image encoder"):
        with_ip_adapters(part_of(store, "tiny-sd", "denoiser"), root, ["bad"], Nowhere().send)
