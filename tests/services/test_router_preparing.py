"""Models that no replica holds: later stages load while earlier ones run, where the request will then go."""

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from darkroom.errors import DarkroomError, DeviceFull, StoreUnavailable, UnusableModel
from darkroom.v1 import router_pb2, stage_pb2, stage_pb2_grpc
from darkroom.wire.conditions import ConditionFiles, ControlUse
from darkroom.wire.graphs import DenoiseWork, Graph, Node
from services.router.calls import Preparation
from tests.services.neighbours import (
    MODEL,
    Neighbours,
    RunningRouter,
    RunningStage,
    engine_held,
    eventually,
    failure_of,
)
from tests.services.routing import attempts, finish, generate, refusal, start_all, txt2img, within
from tests.tiny.variants import CONTROLNETS


@pytest.fixture(scope="session")
def store(tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MODEL twice and a ControlNet for it, and a model whose UNet has a weight that is no number."""
    root = tmp_path_factory.mktemp("cold")
    for name in (MODEL, "other", "broken"):
        shutil.copytree(tiny_store / MODEL, root / name)
    weights = root / "broken" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\xc0\x7f")
    CONTROLNETS["control-sd"]().save_pretrained(root / "control-sd", safe_serialization=True)
    return root


@pytest.fixture
async def neighbours(store: Path) -> AsyncIterator[Neighbours]:
    async with Neighbours(store) as started:
        yield started


def has(stage: RunningStage, *names: str) -> bool:
    return {part.model_id for part in stage.replica.state().parts} >= set(names or (MODEL,))


def replicas(result: router_pb2.GenerateResult) -> dict[str, str]:
    return {timing.node_id: timing.replica_id for timing in result.timings}


def is_at_rest(router: RunningRouter) -> bool:
    """Whether the router counts on no load and no request."""
    assignments = router.runner._placing.assignments
    return not (assignments.running or assignments._loads or assignments._coming)


@asynccontextmanager
async def waiting_at_the_encoder(neighbours: Neighbours, router: RunningRouter) -> AsyncIterator[Any]:
    """A request that is being encoded as long as the block runs."""
    (encoder,) = neighbours.stages("encoder")
    async with engine_held(encoder):
        call = asyncio.create_task(finish(generate(router)))
        await eventually(lambda: encoder.running_count == 1)
        yield call


async def test_later_stages_load_while_the_prompt_is_encoded(neighbours: Neighbours) -> None:
    await neighbours.stage("encoder")
    denoiser, vae = [await neighbours.stage(stage, is_cold=True) for stage in ("denoiser", "vae")]
    router = await neighbours.router()
    async with waiting_at_the_encoder(neighbours, router) as call:
        await eventually(lambda: has(denoiser) and has(vae))
        assert not call.done()
        assert denoiser.running_count == vae.running_count == 0
    assert attempts(await call) == {"encode": 1, "denoise": 1, "decode": 1}
    assert sorted(router.heard.asked) == ["denoiser", "vae"]
    assert router.heard.prepared == [Preparation.LOADED] * 2
    await eventually(lambda: is_at_rest(router))


async def test_without_hints_stages_load_one_after_the_other(neighbours: Neighbours) -> None:
    await neighbours.stage("encoder")
    denoiser, vae = [await neighbours.stage(stage, is_cold=True) for stage in ("denoiser", "vae")]
    router = await neighbours.router(prepares_stages=False)
    async with waiting_at_the_encoder(neighbours, router) as call:
        await asyncio.sleep(0.3)
        assert MODEL not in denoiser.replica
        assert MODEL not in vae.replica
    assert (await call).images
    assert router.heard.asked == []


async def test_a_warm_request_sends_no_hint(neighbours: Neighbours) -> None:
    await start_all(neighbours)
    await neighbours.stage("denoiser", 0, is_cold=True)
    router = await neighbours.router()
    result = await finish(generate(router))
    assert replicas(result)["denoise"] == "denoiser-1"
    assert router.heard.asked == []


async def test_the_replica_that_loads_is_the_one_that_runs_it(neighbours: Neighbours) -> None:
    await neighbours.stage("encoder")
    await neighbours.stage("vae")
    two, one = [await neighbours.stage("denoiser", number, is_cold=True) for number in (2, 1)]
    router = await neighbours.router()
    async with waiting_at_the_encoder(neighbours, router) as call:
        await eventually(lambda: has(one))
        await neighbours.stage("denoiser", 0, is_cold=True)  # it would be first among equals
        await eventually(lambda: len(router.view.members("denoiser")) == 3)
    assert replicas(await call)["denoise"] == "denoiser-1"
    assert MODEL not in two.replica


async def test_cold_models_of_two_requests_load_on_two_replicas(neighbours: Neighbours) -> None:
    encoder = await neighbours.stage("encoder")
    await neighbours.stage("vae")
    denoisers = [await neighbours.stage("denoiser", number, is_cold=True) for number in (1, 2)]
    router = await neighbours.router()
    async with engine_held(encoder):
        calls = [asyncio.create_task(finish(generate(router, model_id=name))) for name in (MODEL, "other")]
        await eventually(lambda: sum(len(stage.replica.state().parts) for stage in denoisers) == 2)
        assert [len(stage.replica.state().parts) for stage in denoisers] == [1, 1]
    assert len({replicas(result)["denoise"] for result in await asyncio.gather(*calls)}) == 2


async def test_when_the_prepared_replica_dies_another_prepares_and_runs_it(neighbours: Neighbours) -> None:
    await neighbours.stage("encoder")
    await neighbours.stage("vae")
    dying, other = [await neighbours.stage("denoiser", number, is_cold=True) for number in (1, 2)]
    may_load = asyncio.Event()
    async with loads_held(dying, may_load):
        router = await neighbours.router()
        async with waiting_at_the_encoder(neighbours, router) as call:
            await eventually(lambda: MODEL in dying.replica)
            await dying.kill()
            await eventually(lambda: has(other))
            assert not call.done()
        result = await call
    assert replicas(result)["denoise"] == "denoiser-2"
    assert attempts(result)["denoise"] == 1, "the dead one is a suspect already"
    await eventually(lambda: is_at_rest(router))


async def test_a_replica_that_dies_while_it_prepares_is_a_suspect(neighbours: Neighbours) -> None:
    await neighbours.stage("encoder")
    await neighbours.stage("vae")
    dying = await neighbours.stage("denoiser", 1, is_cold=True)
    await neighbours.stage("denoiser", 2, is_cold=True, takes_hints=False)
    router = await neighbours.router()
    async with loads_held(dying, asyncio.Event()), waiting_at_the_encoder(neighbours, router) as call:
        await eventually(lambda: MODEL in dying.replica)
        await dying.kill()
        await eventually(lambda: router.heard.prepared == [Preparation.UNHEARD])
    assert attempts(await call)["denoise"] == 1, "both are cold, and the dead one would be first among equals"


async def test_a_request_goes_elsewhere_when_its_prepared_replica_has_died_since(neighbours: Neighbours) -> None:
    await neighbours.stage("encoder")
    await neighbours.stage("vae")
    dying, _ = [await neighbours.stage("denoiser", number, is_cold=True) for number in (1, 2)]
    router = await neighbours.router()
    async with waiting_at_the_encoder(neighbours, router) as call:
        await eventually(lambda: Preparation.LOADED in router.heard.prepared)
        await dying.kill()
    result = await call
    assert replicas(result)["denoise"] == "denoiser-2"
    assert attempts(result)["denoise"] == 2


async def test_a_suspect_is_passed_over_even_if_it_is_prepared(neighbours: Neighbours) -> None:
    await neighbours.stage("encoder")
    await neighbours.stage("vae")
    for number in (1, 2):
        await neighbours.stage("denoiser", number, is_cold=True)
    router = await neighbours.router()
    async with waiting_at_the_encoder(neighbours, router) as call:
        await eventually(lambda: Preparation.LOADED in router.heard.prepared)
        router.runner._placing.suspect("denoiser-1")
    assert replicas(await call)["denoise"] == "denoiser-2"


async def test_a_stage_that_takes_no_hints_is_asked_as_before(neighbours: Neighbours) -> None:
    await neighbours.stage("encoder")
    for stage in ("denoiser", "vae"):
        await neighbours.stage(stage, is_cold=True, takes_hints=False)
    router = await neighbours.router()
    async with waiting_at_the_encoder(neighbours, router) as call:
        await eventually(lambda: router.heard.prepared == [Preparation.UNHEARD] * 2)
        await eventually(lambda: not router.runner._placing.assignments._loads)
    assert attempts(await call) == {"encode": 1, "denoise": 1, "decode": 1}


async def test_what_keeps_a_model_from_loading_is_said_by_the_request_itself(neighbours: Neighbours) -> None:
    await start_all(neighbours)
    router = await neighbours.router()
    error = await refusal(generate(router, model_id="broken"))
    assert isinstance(error, UnusableModel)
    assert error.facts["model_id"] == "broken"
    assert "denoiser part" in error.message
    await eventually(lambda: is_at_rest(router))
    assert attempts(await finish(generate(router))) == {"encode": 1, "denoise": 1, "decode": 1}


@pytest.mark.parametrize(
    "error", [StoreUnavailable(MODEL, "it does not answer"), DeviceFull(MODEL, "5")], ids=["store down", "device full"]
)
async def test_a_hint_that_fails_where_all_is_well_makes_no_suspect(
    neighbours: Neighbours, error: DarkroomError
) -> None:
    await neighbours.stage("encoder")
    denoiser = await neighbours.stage("denoiser", is_cold=True)
    await neighbours.stage("vae")
    router = await neighbours.router()

    def fail(model_id: str) -> Any:
        raise error

    denoiser.replica._parts._load = fail
    (encoder,) = neighbours.stages("encoder")
    async with engine_held(encoder):
        call = asyncio.create_task(refusal(generate(router)))
        await eventually(lambda: encoder.running_count == 1 and router.heard.asked == ["denoiser"])
        await eventually(lambda: not router.runner._placing.assignments._loads)
        assert router.runner._placing._suspect_until_s == {}
        assert not call.done()
    assert type(await call) is type(error)


async def test_a_caller_that_leaves_ends_the_hint_and_not_the_load(neighbours: Neighbours) -> None:
    await neighbours.stage("encoder")
    denoiser = await neighbours.stage("denoiser", is_cold=True)
    await neighbours.stage("vae")
    router = await neighbours.router()
    may_load = asyncio.Event()
    async with loads_held(denoiser, may_load), waiting_at_the_encoder(neighbours, router) as call:
        await eventually(lambda: MODEL in denoiser.replica)
        call.cancel()
        await eventually(lambda: is_at_rest(router))
        may_load.set()
        await eventually(lambda: has(denoiser))
    assert router.heard.prepared == []


async def test_controlnets_are_loaded_ahead_too_even_for_a_model_that_is_there(neighbours: Neighbours) -> None:
    encoder = await neighbours.stage("encoder")
    denoiser = await neighbours.stage("denoiser")
    await neighbours.stage("vae")
    router = await neighbours.router()
    async with engine_held(encoder):
        call = asyncio.create_task(_run(router, _controlled(txt2img())))
        await eventually(lambda: has(denoiser, MODEL, "control-sd"))
        await eventually(lambda: encoder.running_count == 1)
        call.cancel()
    assert router.heard.asked == ["denoiser"]
    await eventually(lambda: is_at_rest(router))


async def _run(router: RunningRouter, graph: Graph) -> None:
    async for _ in router.runner.run(graph, within(30.0)):
        pass


def _controlled(graph: Graph) -> Graph:
    control = ControlUse(controlnet_id="control-sd", image=b"a picture", scale=1.0, start=0.0, end=1.0)

    def changed(node: Node) -> Node:
        if not isinstance(node.work, DenoiseWork):
            return node
        return replace(node, work=replace(node.work, conditions=ConditionFiles(controls=(control,))))

    return Graph(tuple(changed(node) for node in graph.nodes))


@asynccontextmanager
async def loads_held(stage: RunningStage, may_load: asyncio.Event) -> AsyncIterator[None]:
    """Inside the block what the replica loads comes no sooner than it may."""
    loop, parts = asyncio.get_running_loop(), stage.replica._parts
    load = parts._load

    def wait_and_load(model_id: str) -> Any:
        asyncio.run_coroutine_threadsafe(may_load.wait(), loop).result(60.0)
        return load(model_id)

    parts._load = wait_and_load
    try:
        yield
    finally:
        may_load.set()


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"model_id": ""}, "model_id"), ({"model_id": "../x"}, "model_id"), ({"model_id": "x" * 4096}, "model_id"),
        ({"request_id": "a b"}, "request_id"), ({"loras": [{"lora_id": "../x"}]}, "loras[0].lora_id"),
        ({"loras": [{"lora_id": "ink", "scale": float("nan")}]}, "loras[0].scale"),
        ({"loras": [{"lora_id": f"l{n}"} for n in range(40)]}, "loras"),
        ({"controlnet_ids": ["control-sd", "file:x"]}, "controlnet_ids[1]"),
        ({"controlnet_ids": ["control-sd"] * 5}, "controlnet_ids"),
        ({"controlnet_ids": ["control-sd"]}, "controlnet_ids"),
    ],
)  # fmt: skip
async def test_a_wrong_field_of_a_hint_is_named(neighbours: Neighbours, changes: dict[str, Any], field: str) -> None:
    vae = await neighbours.stage("vae")
    error = await refusal(_hint(vae, **changes))
    assert error.facts["field"] == field


async def test_a_hint_of_a_model_that_is_not_there_is_not_found(neighbours: Neighbours) -> None:
    for stage in ("encoder", "denoiser", "vae"):
        running = await neighbours.stage(stage)
        error = await failure_of(_hint(running, model_id="nowhere"))
        assert error.code() is grpc.StatusCode.NOT_FOUND
        assert has(running)


def _hint(stage: RunningStage, **changes: Any) -> Any:
    request = stage_pb2.PrepareRequest(**{"model_id": MODEL, **changes})
    return stage_pb2_grpc.StageServiceStub(stage.channel).Prepare(request, timeout=20.0)
