"""Networks called by gRPC: from a denoiser's program to the replica that holds them, and by anybody."""

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from darkroom.errors import DeadlinePassed, QueueFull, StageUnavailable
from darkroom.models.denoising import denoise
from darkroom.models.journal import Journal
from darkroom.models.program import Ticket
from darkroom.models.tensors import to_raw
from darkroom.models.variants import UNCONDITIONED, Conditions
from darkroom.v1 import network_pb2, network_pb2_grpc, tensor_pb2
from darkroom.wire.tensors import value_message
from tests.models.denoise_runs import embeddings_of
from tests.models.oracle import Wanted, denoise_task
from tests.models.variant_runs import Case
from tests.services.neighbours import MODEL, Neighbours, RunningStage, engine_held, eventually, failure_of
from tests.tiny.variants import save_variants
from tests.tiny_models import save_tiny_model

WANTED = Wanted("a red circle", 1, 5, 4.0)
FROM_IMAGE = Case(model_id=MODEL, plain="", image=True, strength=0.6)
MASKED = Case(model_id=MODEL, plain="", image=True, mask=True, strength=0.6)
CONTROLLED = Case(model_id=MODEL, plain="", controls=("control-sd", "control-sd-other"))
PIXELS = torch.zeros(1, 3, 16, 16)


@pytest.fixture(scope="session")
def variant_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("variants")
    save_tiny_model(root, MODEL)
    save_variants(root)
    return root


@pytest.fixture
async def neighbours(variant_store: Path) -> AsyncIterator[Neighbours]:
    async with Neighbours(variant_store) as started:
        yield started


async def drawn(denoiser: RunningStage, conditions: Conditions, *, ticket: Ticket | None = None) -> torch.Tensor:
    """What the denoiser's program makes of these conditions."""
    part = await denoiser.replica.part(MODEL)
    ticket = ticket or Ticket(alone=True)
    task, embeddings = denoise_task(part, WANTED), embeddings_of(part, WANTED.guidance)
    return await denoiser.replica.run(
        partial(denoise, part, task, embeddings, Journal(ticket), conditions=conditions), ticket
    )


def ask(stage: RunningStage, arguments: str, **changes: Any) -> Any:
    good: dict[str, Any] = {
        "model_id": MODEL, "network": "vae", "method": "encode", "arguments_json": arguments,
        "tensors": [tensor_pb2.NamedTensor(name="t0", tensor=value_message(to_raw(PIXELS)))],
    }  # fmt: skip
    stub = network_pb2_grpc.NetworkServiceStub(stage.channel)
    return stub.CallNetwork(network_pb2.CallNetworkRequest(**{**good, **changes}), timeout=20.0)


@pytest.mark.parametrize("case", [FROM_IMAGE, MASKED], ids=["image", "mask"])
async def test_images_are_encoded_by_a_vae_replica(neighbours: Neighbours, variant_store: Path, case: Case) -> None:
    vae, denoiser = await neighbours.stage("vae"), await neighbours.stage("denoiser")
    conditions = case.conditions(variant_store, 1)
    latents = await drawn(denoiser, conditions)
    assert vae.forward_count == (1 if case is FROM_IMAGE else 2)
    assert denoiser.forward_count == 3
    by_ref = await neighbours.stage("denoiser", 2, inline_limit_bytes=0)
    assert torch.equal(await drawn(by_ref, conditions), latents)
    assert by_ref.shelf.size_bytes > 0
    assert not torch.equal(await drawn(denoiser, case.conditions(variant_store, 2)), latents)


async def test_answers_too_large_for_a_message_are_fetched(neighbours: Neighbours, variant_store: Path) -> None:
    vae, denoiser = await neighbours.stage("vae", inline_limit_bytes=0), await neighbours.stage("denoiser")
    assert (await drawn(denoiser, FROM_IMAGE.conditions(variant_store, 1))).isfinite().all()
    assert vae.shelf.size_bytes > 0


async def test_others_go_on_while_the_vae_is_busy(neighbours: Neighbours, variant_store: Path) -> None:
    vae, denoiser = await neighbours.stage("vae"), await neighbours.stage("denoiser")
    async with engine_held(vae):
        waiting = asyncio.create_task(drawn(denoiser, FROM_IMAGE.conditions(variant_store, 1)))
        await eventually(lambda: vae.running_count == 1)
        assert (await drawn(denoiser, UNCONDITIONED)).isfinite().all()
        assert not waiting.done()
    assert (await waiting).isfinite().all()


async def test_a_request_that_leaves_takes_its_call_along(neighbours: Neighbours, variant_store: Path) -> None:
    vae, denoiser = await neighbours.stage("vae"), await neighbours.stage("denoiser")
    async with engine_held(vae):
        waiting = asyncio.create_task(drawn(denoiser, FROM_IMAGE.conditions(variant_store, 1)))
        await eventually(lambda: vae.running_count == 1)
        waiting.cancel()
        await eventually(lambda: vae.running_count == 0)


async def test_when_the_vae_dies_another_is_called(neighbours: Neighbours, variant_store: Path) -> None:
    first, second = await neighbours.stage("vae"), await neighbours.stage("vae", 2)
    denoiser = await neighbours.stage("denoiser")
    conditions = FROM_IMAGE.conditions(variant_store, 1)
    latents = await drawn(denoiser, conditions)
    async with engine_held(first):
        waiting = asyncio.create_task(drawn(denoiser, conditions))
        await eventually(lambda: first.running_count == 1)
        await first.kill()
        assert torch.equal(await waiting, latents)
    assert second.forward_count == 1
    assert torch.equal(await drawn(denoiser, conditions), latents)
    await second.kill()
    with pytest.raises(StageUnavailable) as caught:
        await drawn(denoiser, conditions)
    assert caught.value.facts["stage"] == "vae"


async def test_without_a_vae_the_error_says_so(neighbours: Neighbours, variant_store: Path) -> None:
    denoiser = await neighbours.stage("denoiser")
    with pytest.raises(StageUnavailable, match="no vae replica"):
        await drawn(denoiser, FROM_IMAGE.conditions(variant_store, 1))


async def test_a_full_vae_is_passed_over(neighbours: Neighbours, variant_store: Path) -> None:
    full, denoiser = await neighbours.stage("vae", max_running=1), await neighbours.stage("denoiser")
    conditions = FROM_IMAGE.conditions(variant_store, 1)
    async with engine_held(full):
        waiting = asyncio.ensure_future(ask(full, '{"dict":{"x":{"tensor":"t0","type":"float32"}}}'))
        await eventually(lambda: full.running_count == 1)
        with pytest.raises(QueueFull):
            await drawn(denoiser, conditions)
        other = await neighbours.stage("vae", 2)
        assert (await drawn(denoiser, conditions)).isfinite().all()
        assert other.forward_count == 1
    await waiting


async def test_a_call_takes_no_longer_than_the_request_has(neighbours: Neighbours, variant_store: Path) -> None:
    vae, denoiser = await neighbours.stage("vae"), await neighbours.stage("denoiser")
    conditions = FROM_IMAGE.conditions(variant_store, 1)
    await drawn(denoiser, conditions)
    async with engine_held(vae):
        deadline_s = asyncio.get_running_loop().time() + 0.5  # the clock of `time.monotonic`
        with pytest.raises(DeadlinePassed):
            await drawn(denoiser, conditions, ticket=Ticket(alone=True, deadline_s=deadline_s))
        await eventually(lambda: vae.running_count == 0)


async def test_controlnets_of_a_stage_of_their_own_lead_as_those_here(
    neighbours: Neighbours, variant_store: Path
) -> None:
    denoiser = await neighbours.stage("denoiser")
    here = await drawn(denoiser, CONTROLLED.conditions(variant_store, 1))
    count = denoiser.forward_count
    assert count == 3 * WANTED.steps
    send = denoiser.replica.send
    assert send is not None
    there = CONTROLLED.conditions(variant_store, 1, send)
    with pytest.raises(StageUnavailable, match="no controlnet replica"):
        await drawn(denoiser, there)
    controlnet = await neighbours.stage("controlnet")
    before = denoiser.forward_count
    assert torch.equal(await drawn(denoiser, there), here)
    assert (controlnet.forward_count, denoiser.forward_count - before) == (2 * WANTED.steps, WANTED.steps)


@pytest.mark.parametrize(
    ("arguments", "changes", "code"),
    [
        ('{"dict":{"x":{"tensor":"t0","type":"float32"}}}', {"method": "train"}, grpc.StatusCode.INVALID_ARGUMENT),
        ('{"dict":{"x":{"tensor":"t0","type":"float32"}}}', {"network": "a.b"}, grpc.StatusCode.INVALID_ARGUMENT),
        ('{"dict":{"x":{"tensor":"t0","type":"float32"}}}', {"network": "unet"}, grpc.StatusCode.NOT_FOUND),
        ('{"dict":{"x":{"tensor":"t0","type":"float32"}}}', {"model_id": "nothing"}, grpc.StatusCode.NOT_FOUND),
        ('{"dict":{"x":{"tensor":"t7","type":"float32"}}}', {}, grpc.StatusCode.INVALID_ARGUMENT),
        ('{"dict":{"x":1}}', {}, grpc.StatusCode.INVALID_ARGUMENT),
        ("{", {}, grpc.StatusCode.INVALID_ARGUMENT),
        ("[" * 100_000, {}, grpc.StatusCode.INVALID_ARGUMENT),
        ("null", {}, grpc.StatusCode.INVALID_ARGUMENT),
    ],
)
async def test_calls_that_cannot_be_made_are_refused(
    neighbours: Neighbours, arguments: str, changes: dict[str, Any], code: grpc.StatusCode
) -> None:
    vae = await neighbours.stage("vae")
    assert (await failure_of(ask(vae, arguments, **changes))).code() is code
    assert (await ask(vae, '{"dict":{"x":{"tensor":"t0","type":"float32"}}}')).answer_json
