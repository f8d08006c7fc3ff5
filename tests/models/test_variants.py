"""Image to image, inpainting and ControlNets, as plain diffusers draws them: alone bit for bit, together closely."""

import io
import json
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline

from darkroom.errors import InvalidField, ModelNotFound, UnusableModel
from darkroom.models import programs
from darkroom.models.controlnets import ControlNets, load_controlnet
from darkroom.models.denoising import denoise
from darkroom.models.executor import Executor
from darkroom.models.journal import Journal, Snapshot
from darkroom.models.program import Ticket
from darkroom.models.variants import Conditions, Control, check_conditions, read_conditions, variant
from darkroom.schedulers import DIFFUSION_SCHEDULERS, FLOW_SCHEDULERS, scheduler_choice
from darkroom.wire.conditions import ConditionFiles, ControlUse
from tests.models.oracle import CPU, NEGATIVE, SIZE_PX, Wanted, decode_task, held_up
from tests.models.variant_runs import (
    CASES,
    REQUESTS,
    Case,
    Elsewhere,
    mask,
    part_of,
    picture,
    plain_latents,
    requested,
)
from tests.tiny.ip_adapters import IP_ADAPTERS, save_ip_adapter
from tests.tiny.variants import save_variants
from tests.tiny_models import save_tiny_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),
]
MODELS = ("tiny-sd", "tiny-sdxl", "tiny-sd3", "tiny-flux", "tiny-qwen-image", "tiny-z-image", "tiny-pixart-sigma")


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("variants")
    for model_id in MODELS:
        save_tiny_model(root, model_id)
    save_variants(root)
    for adapter_id in IP_ADAPTERS:
        save_ip_adapter(root, adapter_id)
    return root


def error(found: torch.Tensor, right: torch.Tensor) -> float:
    return float((found - right).norm() / right.norm())


@pytest.mark.parametrize("name", CASES)
def test_a_variant_draws_what_plain_diffusers_draws(
    store: Path, executor: Executor, elsewhere: Elsewhere, name: str
) -> None:
    case = CASES[name]
    part = case.part(store, elsewhere.send)
    asked = [requested(store, case, wanted, executor, part) for wanted in REQUESTS]
    conditions = [case.conditions(store, wanted.seed) for wanted in REQUESTS]
    expected = [plain_latents(store, case, wanted, part) for wanted in REQUESTS]

    def programs(*, alone: bool) -> list[tuple[Future[Any], Ticket]]:
        runs = []
        with held_up(executor):
            for (task, embeddings), condition in zip(asked, conditions, strict=True):
                check_conditions(part, condition, task.step_count)
                ticket = Ticket(alone=alone)
                program = partial(denoise, part, task, embeddings, Journal(ticket), conditions=condition)
                runs.append(executor.submit(program, ticket=ticket))
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
    part = case.part(store, elsewhere.send)
    task, embeddings = requested(store, case, wanted, executor, part)
    condition = case.conditions(store, wanted.seed)
    program = partial(
        denoise, part, replace(task, image_count=2), embeddings, Journal(Ticket(alone=True)), conditions=condition
    )
    latents = executor.submit(program, alone=True)[0].result(60)
    assert torch.equal(latents, plain_latents(store, case, wanted, part, image_count=2))
    second = replace(wanted, seed=wanted.seed + 1)
    task, _ = requested(store, case, second, executor, part)
    single = executor.submit(
        partial(denoise, part, task, embeddings, Journal(Ticket(alone=True)), conditions=condition), alone=True
    )[0].result(60)
    assert error(latents[1:], single) <= 1e-5


def run(executor: Executor, part: Any, asked: tuple[Any, Any], conditions: Conditions, journal: Journal) -> Any:
    task, embeddings = asked
    program = partial(denoise, part, task, embeddings, journal, conditions=conditions)
    return executor.submit(program, ticket=journal.ticket)[0].result(60)


def travelled(snapshot: Snapshot) -> Snapshot:
    """The snapshot as another process reads it."""
    return replace(snapshot, state=json.loads(json.dumps(snapshot.state)))


RESUMED = [
    *(("sd image", solver) for solver in ("ddim", "pndm", "dpmpp_2m_sde", "heun")),
    *(("sd inpaint", solver) for solver in ("ddim", "euler_a", "unipc")),
    *(("sd 2 controls", solver) for solver in ("dpmpp_2m", "lcm")),
    ("sd inpaint 9", "euler"),
    ("xl inpaint control", "kdpm2_a"),
    ("xl refiner", "dpmpp_2s"),
    ("sd3 image", "flow_heun"),
    ("flux inpaint control", "flow_euler"),
    ("qwen control", "flow_euler"),
    ("z inpaint", "flow_euler"),
    ("sd 2 ip", "dpmpp_2m"),
    ("flux ip", "flow_euler"),
]


@pytest.mark.parametrize(("name", "solver"), RESUMED)
def test_a_variant_stopped_after_any_step_goes_on_bit_for_bit(
    store: Path, executor: Executor, elsewhere: Elsewhere, name: str, solver: str
) -> None:
    case, wanted = CASES[name], REQUESTS[0]
    part = case.part(store, elsewhere.send)
    task, embeddings = requested(store, case, wanted, executor, part)
    asked, conditions = (replace(task, scheduler=solver), embeddings), case.conditions(store, wanted.seed)
    snapshots: dict[int, Any] = {}
    whole = Journal(
        Ticket(alone=True), on_step=lambda done: snapshots.update({done.step: done.snapshot}), snapshot_interval=1
    )
    latents = run(executor, part, asked, conditions, whole)
    step_count, encodes = len(snapshots), len(elsewhere.calls)
    assert step_count >= 3
    for step, snapshot in snapshots.items():
        rest = Journal(Ticket(alone=True), start=travelled(snapshot))
        assert torch.equal(run(executor, part, asked, conditions, rest), latents)
        assert rest.ticket.forwards * step_count == whole.ticket.forwards * (step_count - step)
    assert len(elsewhere.calls) == encodes * (1 + step_count)


@pytest.mark.parametrize("name", ["sd image", "sd inpaint", "xl image control", "sd3 image"])
def test_the_pipeline_says_how_many_steps_are_left_of_its_solver(
    store: Path, executor: Executor, elsewhere: Elsewhere, name: str
) -> None:
    case, wanted = CASES[name], REQUESTS[1]
    part = case.part(store, elsewhere.send)
    task, embeddings = requested(store, case, wanted, executor, part)
    conditions = case.conditions(store, wanted.seed)
    for solver in FLOW_SCHEDULERS if name.startswith("sd3") else DIFFUSION_SCHEDULERS:
        steps: list[int] = []
        journal = Journal(Ticket(), on_step=lambda done, steps=steps: steps.append(done.step))  # type: ignore[misc]
        run(executor, part, (replace(task, scheduler=solver), embeddings), conditions, journal)
        assert journal._loop._num_timesteps == len(steps)


@pytest.mark.parametrize("solver", ["euler", "ddim", "dpmpp_2m", "unipc"])
def test_a_refiner_takes_over_as_in_plain_diffusers(
    store: Path, executor: Executor, elsewhere: Elsewhere, solver: str
) -> None:
    wanted, share, step = Wanted("a red circle", 1, 10, 5.0), 0.8, 8
    snapshots: list[Any] = []
    base, refiner = (part_of(store, name, "denoiser", elsewhere.send) for name in ("tiny-sdxl", "tiny-sdxl-refiner"))
    for part in (base, refiner):
        case = Case(model_id=part.model_id, plain="")
        task, embeddings = requested(store, case, wanted, executor, part)
        journal = Journal(Ticket(alone=True), on_step=lambda done: snapshots.append(done.snapshot), snapshot_interval=1)
        if part is base:
            journal.to_step = step
        else:
            journal.start, journal.takes_latents_only = travelled(snapshots[-1]), True
        latents = run(executor, part, (replace(task, scheduler=solver), embeddings), Conditions(), journal)
    assert journal.ticket.forwards == wanted.steps - step
    choice = scheduler_choice(solver)
    given = {
        "prompt": wanted.prompt, "negative_prompt": NEGATIVE, "guidance_scale": wanted.guidance,
        "num_inference_steps": wanted.steps, "output_type": "latent", "return_dict": False,
    }  # fmt: skip
    halves = []
    for name in ("tiny-sdxl", "tiny-sdxl-refiner"):
        plain = DiffusionPipeline.from_pretrained(store / name)
        plain.set_progress_bar_config(disable=True)
        plain.scheduler = getattr(diffusers, choice.class_name).from_config(plain.scheduler.config)
        halves.append(plain)
    generator = torch.Generator().manual_seed(wanted.seed)
    (handed,) = halves[0](**given, generator=generator, width=SIZE_PX, height=SIZE_PX, denoising_end=share)
    (right,) = halves[1](**given, generator=generator, image=handed, denoising_start=share)
    assert torch.equal(latents, right)


@pytest.mark.parametrize("model_id", ["tiny-sdxl-refiner", "tiny-sd-inpaint"])
def test_models_made_for_one_task_decode_like_any_other(store: Path, executor: Executor, model_id: str) -> None:
    vae = part_of(store, model_id, "vae")
    latents = torch.randn(2, 4, SIZE_PX // 2, SIZE_PX // 2, generator=torch.Generator().manual_seed(0))
    found = executor.submit(partial(programs.decode, vae, decode_task(vae), latents), alone=True)[0].result(60)
    plain = DiffusionPipeline.from_pretrained(store / model_id)
    pixels = plain.vae.decode(latents / plain.vae.config.scaling_factor, return_dict=False)[0]
    right = plain.image_processor.postprocess(pixels.detach(), output_type="pil")
    assert [image.tobytes() for image in found] == [image.tobytes() for image in right]


def test_calls_with_other_scales_of_a_controlnet_share_batches(store: Path) -> None:
    executor = Executor(max_batch_rows=16)  # of its own: it has not learned yet whether batches of so small a net pay
    part, wanted = part_of(store, "tiny-sd", "denoiser"), REQUESTS[0]
    task, embeddings = requested(store, CASES["sd control"], wanted, executor, part)
    rows, runs = list[int](), []
    with held_up(executor):
        for scale in (0.2, 0.9):
            conditions = replace(CASES["sd control"], scales=(scale,)).conditions(store, wanted.seed)
            program = partial(denoise, part, task, embeddings, Journal(Ticket()), conditions=conditions)
            runs.append(executor.submit(program)[0])
        hook = conditions.controls[0].net.network.register_forward_pre_hook(
            lambda _, args, kwargs: rows.append(len(args[0] if args else kwargs["sample"])), with_kwargs=True
        )
    try:
        one, other = (run.result(60) for run in runs)
    finally:
        hook.remove()
        executor.close()
    assert error(one, other) > 1e-3
    assert rows[0] == 4  # guided, two rows of each


@pytest.mark.parametrize("name", ["sd control", "sd 2 controls", "xl control", "flux control"])
def test_a_controlnet_elsewhere_leads_like_one_that_is_here(
    store: Path, executor: Executor, elsewhere: Elsewhere, name: str
) -> None:
    case, wanted = CASES[name], REQUESTS[0]
    part = case.part(store, elsewhere.send)
    asked = requested(store, case, wanted, executor, part)
    here = run(executor, part, asked, case.conditions(store, 1), Journal(Ticket(alone=True)))
    assert "controlnet.controlnet.forward" not in elsewhere.calls
    there = case.conditions(store, 1, elsewhere.send)
    assert all(parameter.is_meta for control in there.controls for parameter in control.net.network.parameters())
    assert torch.equal(run(executor, part, asked, there, Journal(Ticket(alone=True))), here)
    assert elsewhere.calls.count("controlnet.controlnet.forward") == len(case.controls) * wanted.steps


def test_a_variant_is_made_once_and_shares_its_networks(store: Path) -> None:
    part = part_of(store, "tiny-sd", "denoiser")
    conditions = CASES["sd image"].conditions(store, 1)
    made = variant(part, conditions)
    assert variant(part, conditions) is made
    assert made.unet is part.pipeline.unet
    assert variant(part, Conditions()) is part.pipeline


SD_NET = "control-sd"


def controlled(store: Path, net: str = SD_NET) -> Conditions:
    return Conditions(controls=(Control(net=load_controlnet(store, net, CPU), picture=picture(0)),))


@pytest.mark.parametrize(
    ("model_id", "conditions", "field"),
    [
        ("tiny-z-image", controlled, "controls[0]"),
        ("tiny-sdxl", controlled, "controls[0]"),
        ("tiny-flux", controlled, "controls[0]"),
        ("tiny-sd", lambda store: controlled(store, "control-sdxl"), "controls[0]"),
        ("tiny-sd", lambda _: Conditions(image=picture(0), strength=0.1), "strength"),
        ("tiny-sdxl", lambda _: Conditions(image=picture(0)), "strength"),  # its own is 0.3
        ("tiny-sd-inpaint", lambda _: Conditions(), "mask"),
        ("tiny-sd-inpaint", lambda _: Conditions(image=picture(0)), "mask"),
        ("tiny-pixart-sigma", lambda _: Conditions(image=picture(0)), "image"),
        ("tiny-pixart-sigma", lambda _: Conditions(image=picture(0), mask=mask()), "mask"),
    ],
)
def test_what_the_model_cannot_do_is_refused_by_name(store: Path, model_id: str, conditions: Any, field: str) -> None:
    part = part_of(store, model_id, "denoiser")
    with pytest.raises(InvalidField) as caught:
        check_conditions(part, conditions(store), 3)
    assert caught.value.facts["field"] == field


def test_conditions_are_read_from_files_and_a_bad_one_is_named(store: Path) -> None:
    def png(mode: str, size_px: int = SIZE_PX) -> bytes:
        file = io.BytesIO()
        picture(5).resize((size_px, size_px)).convert(mode).save(file, format="PNG")
        return file.getvalue()

    net = load_controlnet(store, SD_NET, CPU)
    use = ControlUse(controlnet_id=SD_NET, image=png("L"), scale=0.5, start=0.1, end=0.9)
    part = part_of(store, "tiny-sd", "denoiser")
    good = ConditionFiles(image=png("RGBA"), mask=png("RGB"), strength=0.4, controls=(use,))
    read = partial(read_conditions, width_px=SIZE_PX, height_px=SIZE_PX)
    found = read(part, good, [net])
    assert found.image is not None
    assert found.mask is not None
    assert (found.image.mode, found.mask.mode, found.strength) == ("RGB", "L", 0.4)
    assert [(c.net, c.picture.mode, c.scale, c.start, c.end) for c in found.controls] == [(net, "RGB", 0.5, 0.1, 0.9)]
    assert read(part, ConditionFiles(), []) == Conditions()
    bad = {
        "image": replace(good, image=png("RGB", 16)),
        "mask": replace(good, mask=b"white"),
        "controls[0].image": replace(good, controls=(replace(use, image=png("RGB")[:100]),)),
    }
    for field, files in bad.items():
        with pytest.raises(InvalidField) as caught:
            read(part, files, [net])
        assert caught.value.facts["field"] == field


async def test_concurrent_loads_of_a_controlnet_are_one(store: Path) -> None:
    nets = ControlNets(store, CPU)
    told: list[Any] = []

    async def on_loaded(net: Any) -> None:
        told.append(net.model_id)

    nets.on_loaded = on_loaded
    one, other = [nets.get(SD_NET) for _ in range(2)]
    assert await one is await other
    await nets.get("control-sdxl")
    assert told == [SD_NET, "control-sdxl"]
    assert [net.model_id for net in nets.loaded] == [SD_NET, "control-sdxl"]


async def test_a_controlnet_that_is_none_is_refused(store: Path, tmp_path: Path) -> None:
    nets = ControlNets(tmp_path, CPU)
    for _ in range(2):  # a failed load is tried again
        with pytest.raises(ModelNotFound):
            await nets.get("nothing")
    for name, config in (("junk", "{"), ("list", "[]"), ("unet", json.dumps({"_class_name": "UNet2DConditionModel"}))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config)
        with pytest.raises(UnusableModel):
            await nets.get(name)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text((store / SD_NET / "config.json").read_text())
    with pytest.raises(UnusableModel):
        await nets.get("empty")
    (tmp_path / "link").symlink_to(store / SD_NET)
    with pytest.raises(UnusableModel):
        await nets.get("link")
    assert nets.loaded == ()
