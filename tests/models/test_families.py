"""Every row of the table against plain diffusers: encode, denoise and decode apart, in company and alone."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from darkroom.errors import InvalidField, InvalidTensor, UnusableModel
from darkroom.families import FAMILIES
from darkroom.models import checks
from darkroom.models.executor import Executor
from darkroom.models.loader import load_part
from darkroom.models.spaces import latent_shape, size_multiple_px
from tests.models.oracle import (
    CPU,
    REQUESTS,
    SIZE_PX,
    Wanted,
    compare,
    decode_task,
    denoise_task,
    encoded,
    parts,
)
from tests.tiny_models import TINY_MODELS, save_tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")  # diffusers' own
LARGEST_ERROR = 1e-5


def test_every_row_has_a_tiny_model(tiny_store: Path) -> None:
    tried = {load_part(tiny_store, model_id, "encoder", CPU).family.pipeline for model_id in TINY_MODELS}
    assert tried == set(FAMILIES)


@pytest.mark.parametrize("model_id", TINY_MODELS)
def test_stages_apart_match_plain_diffusers(tiny_store: Path, model_id: str) -> None:
    found = compare(tiny_store, model_id)
    assert found.batched_share > 0
    assert found.batched_error <= LARGEST_ERROR
    assert found.prompt_effect >= 100 * LARGEST_ERROR
    assert found.is_equal_alone
    assert found.pixel_difference <= 1


@pytest.mark.parametrize("model_id", TINY_MODELS)
def test_a_stage_holds_only_its_own_networks(tiny_store: Path, model_id: str) -> None:
    for part, stage in zip(parts(tiny_store, model_id), ("encoder", "denoiser", "vae"), strict=True):
        everything = {state.name for state in part.network_states()}
        resident = {state.name for state in part.network_states() if state.parameter_count}
        expected = {
            "encoder": {name for name in everything if name.startswith("text_encoder")},
            "denoiser": set(part.denoiser_names),
            "vae": {"vae"},
        }
        assert resident == expected[stage]


def refused_tensor(check: Callable[[], None]) -> str | None:
    """The tensor that the check refuses, if it does."""
    try:
        check()
    except InvalidTensor as error:
        return error.facts["tensor"]
    return None


@pytest.mark.parametrize("model_id", TINY_MODELS)
def test_each_embedding_is_checked(tiny_store: Path, model_id: str) -> None:
    encoder, denoiser = (load_part(tiny_store, model_id, stage, CPU) for stage in ("encoder", "denoiser"))
    executor, wanted = Executor(max_batch_rows=16), Wanted("a ring", 0, 1, 3.0)
    good = encoded(executor, encoder, wanted)
    executor.close()
    task = denoise_task(denoiser, wanted)
    assert set(good) == set(denoiser.family.embedding_names(guided=denoiser.family.is_guided(3.0)))

    def refused(embeddings: dict[str, torch.Tensor]) -> str | None:
        return refused_tensor(partial(checks.check_embeddings, denoiser, task, embeddings))

    assert refused(good) is None
    assert refused({**good, "image_embeds": good["prompt_embeds"]}) == "image_embeds"
    for name, value in good.items():
        assert refused({other: good[other] for other in good if other != name}) == name
        wrong = [value[..., :-1], value[0], torch.cat([value, value]), value[:, :0]]
        if value.is_floating_point():
            wrong.append(value * float("nan"))
        if "mask" in name:
            wrong += [torch.zeros_like(value), value + 2]
        if name in denoiser.family.token_counts:
            wrong.append(value[:, :-1])
        if name in denoiser.family.most_tokens:
            wrong.append(value.repeat(1, 200, 1))
        for bad in wrong:
            answer = refused({**good, name: bad})
            assert answer is not None
            text = name.replace("attention_mask", "embeds").removeprefix("negative_")
            assert answer.replace("attention_mask", "embeds").removeprefix("negative_") == text


@pytest.mark.parametrize("model_id", TINY_MODELS)
def test_latents_of_another_space_are_refused(tiny_store: Path, model_id: str) -> None:
    vae = load_part(tiny_store, model_id, "vae", CPU)
    good = torch.zeros(1, *latent_shape(vae, SIZE_PX, SIZE_PX))
    check = partial(checks.check_latents, vae, decode_task(vae))
    check(good)
    for bad in (good[..., :-1], good[0], good[None], torch.cat([good, good], -1), good * float("nan"), good[:0]):
        assert refused_tensor(partial(check, bad)) == "latents"


@pytest.mark.parametrize("model_id", TINY_MODELS)
def test_sizes_that_the_pipeline_would_refuse_or_round_are_refused(tiny_store: Path, model_id: str) -> None:
    denoiser = load_part(tiny_store, model_id, "denoiser", CPU)
    task = denoise_task(denoiser, REQUESTS[0])
    checks.check_request(denoiser, task)
    for size_px in (SIZE_PX + size_multiple_px(denoiser) // 2, SIZE_PX + 4):
        with pytest.raises(InvalidField, match="width_px"):
            checks.check_request(denoiser, replace(task, width_px=size_px))


def test_a_pipeline_that_needs_two_steps_refuses_one(tiny_store: Path) -> None:
    denoiser = load_part(tiny_store, "tiny-pixart-alpha", "denoiser", CPU)
    with pytest.raises(InvalidField, match="step_count"):
        checks.check_request(denoiser, denoise_task(denoiser, replace(REQUESTS[0], steps=1)))


def test_a_model_that_the_row_was_not_tried_with_is_refused(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, "tiny-cogvideox")
    config = tmp_path / "tiny-cogvideox" / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"patch_size_t": 1, "patch_bias": False}))
    with pytest.raises(UnusableModel, match="patch_size_t of 1"):
        load_part(tmp_path, "tiny-cogvideox", "vae", CPU)
