"""Image to image, inpainting and ControlNets, as plain diffusers draws them: alone bit for bit, together closely."""

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from darkroom.errors import InvalidField
from darkroom.models.executor import Executor
from darkroom.models.journal import Journal
from darkroom.models.program import Ticket
from darkroom.models.variants import Conditions, check_conditions, variant
from tests.models.oracle import Wanted
from tests.models.variant_runs import (
    Case,
    Elsewhere,
    denoise_variant,
    mask,
    part_of,
    picture,
    plain_latents,
    requested,
)
from tests.tiny.variants import save_variants
from tests.tiny_models import save_tiny_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),
]
MODELS = ("tiny-sd", "tiny-sdxl", "tiny-sd3", "tiny-flux", "tiny-qwen-image", "tiny-z-image")
SD, XL = "StableDiffusion", "StableDiffusionXL"
CASES = {
    "sd image": Case(model_id="tiny-sd", plain=f"{SD}Img2ImgPipeline", image=True, strength=0.6),
    "sd inpaint": Case(model_id="tiny-sd", plain=f"{SD}InpaintPipeline", image=True, mask=True, strength=0.7),
    "sd inpaint all": Case(model_id="tiny-sd", plain=f"{SD}InpaintPipeline", image=True, mask=True),
    "sd inpaint 9": Case(model_id="tiny-sd-inpaint", plain=f"{SD}InpaintPipeline", image=True, mask=True, strength=1.0),
    "sd control": Case(model_id="tiny-sd", plain=f"{SD}ControlNetPipeline", controls=("control-sd",)),
    "sd 2 controls": Case(
        model_id="tiny-sd", plain=f"{SD}ControlNetPipeline", controls=("control-sd", "control-sd-other")
    ),
    "sd image control": Case(
        model_id="tiny-sd", plain=f"{SD}ControlNetImg2ImgPipeline", image=True, strength=0.6, controls=("control-sd",)
    ),
    "sd inpaint control": Case(
        model_id="tiny-sd",
        plain=f"{SD}ControlNetInpaintPipeline",
        image=True,
        mask=True,
        strength=0.6,
        controls=("control-sd",),
    ),
    "xl image": Case(model_id="tiny-sdxl", plain=f"{XL}Img2ImgPipeline", image=True, strength=0.6),
    "xl refiner": Case(model_id="tiny-sdxl-refiner", plain=f"{XL}Img2ImgPipeline", image=True, strength=0.6),
    "xl inpaint": Case(model_id="tiny-sdxl", plain=f"{XL}InpaintPipeline", image=True, mask=True, strength=0.8),
    "xl control": Case(model_id="tiny-sdxl", plain=f"{XL}ControlNetPipeline", controls=("control-sdxl",)),
    "xl image control": Case(
        model_id="tiny-sdxl",
        plain=f"{XL}ControlNetImg2ImgPipeline",
        image=True,
        strength=0.6,
        controls=("control-sdxl",),
    ),
    "xl inpaint control": Case(
        model_id="tiny-sdxl",
        plain=f"{XL}ControlNetInpaintPipeline",
        image=True,
        mask=True,
        strength=0.6,
        controls=("control-sdxl",),
    ),
    "sd3 image": Case(model_id="tiny-sd3", plain=f"{SD}3Img2ImgPipeline", image=True, strength=0.6),
    "sd3 inpaint": Case(model_id="tiny-sd3", plain=f"{SD}3InpaintPipeline", image=True, mask=True, strength=0.6),
    "flux image": Case(model_id="tiny-flux", plain="FluxImg2ImgPipeline", image=True, strength=0.6),
    "flux inpaint": Case(model_id="tiny-flux", plain="FluxInpaintPipeline", image=True, mask=True, strength=0.6),
    "flux control": Case(model_id="tiny-flux", plain="FluxControlNetPipeline", controls=("control-flux",)),
    "flux 2 controls": Case(
        model_id="tiny-flux", plain="FluxControlNetPipeline", controls=("control-flux", "control-flux-other")
    ),
    "flux image control": Case(
        model_id="tiny-flux",
        plain="FluxControlNetImg2ImgPipeline",
        image=True,
        strength=0.6,
        controls=("control-flux",),
    ),
    "flux inpaint control": Case(
        model_id="tiny-flux",
        plain="FluxControlNetInpaintPipeline",
        image=True,
        mask=True,
        strength=0.6,
        controls=("control-flux",),
    ),
    "qwen image": Case(model_id="tiny-qwen-image", plain="QwenImageImg2ImgPipeline", image=True, strength=0.6),
    "qwen inpaint": Case(
        model_id="tiny-qwen-image", plain="QwenImageInpaintPipeline", image=True, mask=True, strength=0.6
    ),
    "qwen control": Case(model_id="tiny-qwen-image", plain="QwenImageControlNetPipeline", controls=("control-qwen",)),
    "z image": Case(model_id="tiny-z-image", plain="ZImageImg2ImgPipeline", image=True, strength=0.6),
    "z inpaint": Case(model_id="tiny-z-image", plain="ZImageInpaintPipeline", image=True, mask=True, strength=0.6),
}
REQUESTS = (Wanted("a red circle", 1, 5, 4.0), Wanted("a ring", 2, 6, 5.0), Wanted("a red circle", 3, 5, 3.0))


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("variants")
    for model_id in MODELS:
        save_tiny_model(root, model_id)
    save_variants(root)
    return root


@pytest.fixture
def executor() -> Iterator[Executor]:
    executor = Executor(max_batch_rows=16)
    yield executor
    executor.close()


@pytest.fixture
def elsewhere(store: Path) -> Iterator[Elsewhere]:
    away = Elsewhere(store)
    yield away
    away.executor.close()


def error(found: torch.Tensor, right: torch.Tensor) -> float:
    return float((found - right).norm() / right.norm())


@pytest.mark.parametrize("name", CASES)
def test_a_variant_draws_what_plain_diffusers_draws(
    store: Path, executor: Executor, elsewhere: Elsewhere, name: str
) -> None:
    case = CASES[name]
    part = part_of(store, case.model_id, "denoiser", elsewhere.send)
    asked = [requested(store, case, wanted, executor, part) for wanted in REQUESTS]
    conditions = [case.conditions(store, wanted.seed) for wanted in REQUESTS]
    expected = [plain_latents(store, case, wanted, part, None, 1) for wanted in REQUESTS]

    def programs(*, alone: bool) -> list[tuple[Future[Any], Ticket]]:
        gate = threading.Event()
        executor.submit(partial(gate.wait, 60))
        runs = []
        for (task, embeddings), condition in zip(asked, conditions, strict=True):
            check_conditions(part, condition, task.step_count)
            ticket = Ticket(alone=alone)
            program = partial(denoise_variant, part, task, embeddings, Journal(ticket), condition)
            runs.append(executor.submit(program, ticket=ticket))
        gate.set()
        return runs

    for (future, _), right in zip(programs(alone=True), expected, strict=True):
        assert torch.equal(future.result(60), right)
    together = programs(alone=False)
    for (future, _), right in zip(together, expected, strict=True):
        assert error(future.result(60), right) <= 1e-5
    assert sum(ticket.batched for _, ticket in together) > 0
    assert error(expected[2], expected[0]) > 1e-2


@pytest.mark.parametrize("name", CASES)
def test_several_images_are_rows_with_noise_of_their_own(
    store: Path, executor: Executor, elsewhere: Elsewhere, name: str
) -> None:
    case, wanted = CASES[name], REQUESTS[0]
    part = part_of(store, case.model_id, "denoiser", elsewhere.send)
    task, embeddings = requested(store, case, wanted, executor, part)
    condition = case.conditions(store, wanted.seed)
    program = partial(
        denoise_variant, part, replace(task, image_count=2), embeddings, Journal(Ticket(alone=True)), condition
    )
    latents = executor.submit(program, alone=True)[0].result(60)
    assert torch.equal(latents, plain_latents(store, case, wanted, part, None, 2))
    second = replace(wanted, seed=wanted.seed + 1)
    task, _ = requested(store, case, second, executor, part)
    single = executor.submit(
        partial(denoise_variant, part, task, embeddings, Journal(Ticket(alone=True)), condition), alone=True
    )[0].result(60)
    assert error(latents[1:], single) <= 1e-5
