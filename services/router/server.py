"""RouterService: message to graph, one domain call, events to messages."""

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator

import grpc

from darkroom.registry.membership import ClusterView
from darkroom.runtime.server import time_left_s
from darkroom.v1 import router_pb2, router_pb2_grpc, vae_pb2
from darkroom.wire import fields
from darkroom.wire.conditions import parse_conditions
from darkroom.wire.graphs import parse_graph
from darkroom.wire.tasks import parse_loras
from darkroom.wire.times import duration
from services.router.calls import CallSettings
from services.router.generation import Prompted, check_against_catalogue, lora_scale, plan_generation
from services.router.running import GraphRunner
from services.router.values import Finished, ImageFile, Images, Latent, NodeProgress, NodeStarted, NodeTiming


class RouterServicer(router_pb2_grpc.RouterServiceServicer):
    """Serves a `GraphRunner`."""

    def __init__(
        self, runner: GraphRunner, view: ClusterView, *, default_model: str, default_deadline_s: float
    ) -> None:
        self._runner, self._view = runner, view
        self._default_model, self._default_deadline_s = default_model, default_deadline_s

    async def Generate(
        self, request: router_pb2.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[router_pb2.GenerateResponse]:
        """Draws images from a prompt."""
        settings = self._settings(request, context)
        plan = plan_generation(_prompted(request, self._default_model, self._view), self._view)
        async with contextlib.aclosing(self._runner.run(plan.graph, settings)) as events:
            async for event in events:
                yield _generate_response(event, plan.seed)

    async def RunGraph(
        self, request: router_pb2.RunGraphRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[router_pb2.RunGraphResponse]:
        """Runs a client's graph."""
        settings = self._settings(request, context)
        graph = parse_graph(request.graph)
        check_against_catalogue(graph, self._view)
        async with contextlib.aclosing(self._runner.run(graph, settings)) as events:
            async for event in events:
                yield _run_graph_response(event)

    def _settings(
        self, request: router_pb2.GenerateRequest | router_pb2.RunGraphRequest, context: grpc.aio.ServicerContext
    ) -> CallSettings:
        left_s = time_left_s(context)
        allowed_s = self._default_deadline_s if math.isinf(left_s) else left_s
        return CallSettings(
            request_id=fields.check_request_id(request.request_id),
            deterministic=request.deterministic,
            deadline_s=asyncio.get_running_loop().time() + allowed_s,
            priority=fields.check_priority(request.priority),
            tenant=fields.check_tenant(request.tenant),
        )


def _prompted(message: router_pb2.GenerateRequest, default_model: str, view: ClusterView) -> Prompted:
    image_count = fields.check_count(
        "image_count", message.image_count if message.HasField("image_count") else 1, fields.MAX_IMAGES
    )
    return Prompted(
        model_id=fields.check_model_id(message.model_id or default_model),
        prompt=fields.check_prompt(message.prompt),
        negative_prompt=fields.check_negative_prompt(message.negative_prompt),
        width_px=message.width_px if message.HasField("width_px") else None,
        height_px=message.height_px if message.HasField("height_px") else None,
        step_count=fields.check_count("step_count", message.step_count, fields.MAX_STEPS)
        if message.HasField("step_count")
        else None,
        guidance_scale=fields.check_guidance_scale(message.guidance_scale)
        if message.HasField("guidance_scale")
        else None,
        seed=fields.check_seed(message.seed, image_count) if message.HasField("seed") else None,
        image_count=image_count,
        scheduler=message.scheduler,
        loras=parse_loras(message.loras, lambda lora_id: lora_scale(lora_id, view)),
        step_cache_threshold=fields.check_step_cache_threshold(message.step_cache_threshold),
        preview_interval=fields.check_range("preview_interval", message.preview_interval, 0, fields.MAX_STEPS),
        frame_count=fields.check_range("frame_count", message.frame_count, 0, fields.MAX_FRAMES),
        conditions=parse_conditions(message),
    )


def _generate_response(event: NodeStarted | NodeProgress | Finished, seed: int) -> router_pb2.GenerateResponse:
    if isinstance(event, NodeStarted):
        return router_pb2.GenerateResponse(node_started=_started(event))
    if isinstance(event, NodeProgress):
        return router_pb2.GenerateResponse(node_progress=_progress(event))
    images = [_image(file) for value in event.values.values() if isinstance(value, Images) for file in value.files]
    latents = [value for value in event.values.values() if isinstance(value, Latent)]
    result = router_pb2.GenerateResult(
        images=images,
        seed=seed,
        timings=[_timing(t) for t in event.timings],
        total_duration=duration(event.total_s),
        batched_forward_count=sum(latent.batched_forward_count for latent in latents),
        cached_forward_count=sum(latent.cached_forward_count for latent in latents),
    )
    return router_pb2.GenerateResponse(result=result)


def _run_graph_response(event: NodeStarted | NodeProgress | Finished) -> router_pb2.RunGraphResponse:
    if isinstance(event, NodeStarted):
        return router_pb2.RunGraphResponse(node_started=_started(event))
    if isinstance(event, NodeProgress):
        return router_pb2.RunGraphResponse(node_progress=_progress(event))
    images = [
        router_pb2.NodeImages(node_id=node_id, images=[_image(file) for file in value.files])
        for node_id, value in event.values.items()
        if isinstance(value, Images)
    ]
    result = router_pb2.RunGraphResult(
        images=images, timings=[_timing(t) for t in event.timings], total_duration=duration(event.total_s)
    )
    return router_pb2.RunGraphResponse(result=result)


def _stage(stage: str) -> str:
    return f"STAGE_{stage.upper()}"


def _started(event: NodeStarted) -> router_pb2.NodeStarted:
    return router_pb2.NodeStarted(node_id=event.node_id, stage=_stage(event.stage), replica_id=event.replica_id)


def _progress(event: NodeProgress) -> router_pb2.NodeProgress:
    previews = [vae_pb2.Image(format=vae_pb2.IMAGE_FORMAT_JPEG, data=preview) for preview in event.done.previews]
    return router_pb2.NodeProgress(
        node_id=event.node_id, step=event.done.step, step_count=event.done.step_count, previews=previews
    )


def _timing(timing: NodeTiming) -> router_pb2.NodeTiming:
    return router_pb2.NodeTiming(
        node_id=timing.node_id,
        stage=_stage(timing.stage),
        replica_id=timing.replica_id,
        call_duration=duration(timing.call_s),
        run_duration=duration(timing.run_s),
        attempt_count=timing.attempt_count,
    )


def _image(file: ImageFile) -> vae_pb2.Image:
    return vae_pb2.Image(
        format=vae_pb2.IMAGE_FORMAT_PNG, data=file.data, width_px=file.width_px, height_px=file.height_px
    )
