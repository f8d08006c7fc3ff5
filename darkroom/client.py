"""The Python client: draws pictures through a router, asks a cache manager what is up."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import grpc

from darkroom.errors import StageUnavailable
from darkroom.runtime.channels import Channels
from darkroom.v1 import (
    cachemgr_pb2,
    cachemgr_pb2_grpc,
    lora_pb2,
    router_pb2,
    router_pb2_grpc,
    stage_pb2,
    stage_pb2_grpc,
)
from darkroom.wire.conditions import NO_CONDITIONS, ConditionFiles, fill
from darkroom.wire.status import from_rpc_error
from darkroom.wire.times import seconds

_QUESTION_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """What to draw; None means the model's default."""

    prompt: str
    model_id: str = ""
    """Empty means the router's default."""
    negative_prompt: str = ""
    width_px: int | None = None
    height_px: int | None = None
    step_count: int | None = None
    guidance_scale: float | None = None
    seed: int | None = None
    image_count: int | None = None
    scheduler: str = ""
    loras: tuple[tuple[str, float | None], ...] = ()
    """Ids and scales; None means the LoRA's own default scale."""
    step_cache_threshold: float = 0.0
    """Above 0, forwards whose answer would change by less than this share are answered from history."""
    preview_interval: int = 0
    """Steps between previews; 0 means none."""
    frame_count: int = 0
    """Frames of a video; 0 means the pipeline's default."""
    conditions: ConditionFiles = NO_CONDITIONS
    """Pictures to start from or be led by."""
    priority: int = 0
    tenant: str = ""
    deterministic: bool = False
    request_id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTime:
    """Where the time of one stage went, in seconds."""

    stage: str
    replica_id: str
    call_s: float
    run_s: float
    attempt_count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """The images, and how they came about."""

    images: tuple[bytes, ...]
    """PNG files."""
    seed: int
    stages: tuple[StageTime, ...]
    total_s: float
    batched_forward_count: int
    cached_forward_count: int


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a request is."""

    stage: str
    step: int = 0
    step_count: int = 0
    previews: tuple[bytes, ...] = ()
    """JPEG files, one small picture per image, where one was due."""


@dataclass(frozen=True, slots=True)
class ReplicaReport:
    """A replica as the cache manager lists it, and what it says of itself; None when it does not answer."""

    listed: cachemgr_pb2.Replica
    state: stage_pb2.DescribeReplicaResponse | None


class Client:
    """A connection to a cluster. Calls raise DarkroomError, or grpc.aio.AioRpcError when the other side has a bug."""

    def __init__(self, *, router_address: str, cachemgr_address: str = "") -> None:
        """Addresses are `host:port`; without a cache manager only drawing works."""
        self._router, self._cachemgr = router_address, cachemgr_address
        self._channels = Channels()

    async def __aenter__(self) -> Self:
        """The client itself."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the connections."""
        await self._channels.close()

    async def draw(
        self, drawing: Drawing, *, timeout_s: float = 300.0, on_progress: Callable[[Progress], None] = lambda _: None
    ) -> Drawn:
        """Draws the images; `on_progress` hears of each stage and step."""
        stub = router_pb2_grpc.RouterServiceStub(self._channels.to(self._router))
        result: router_pb2.GenerateResult | None = None
        try:
            async for event in stub.Generate(_request(drawing), timeout=timeout_s):
                if event.HasField("node_started"):
                    on_progress(Progress(stage_name(event.node_started.stage)))
                elif event.HasField("node_progress"):
                    done = event.node_progress
                    previews = tuple(preview.data for preview in done.previews)
                    on_progress(Progress("denoiser", done.step, done.step_count, previews))
                else:
                    result = event.result
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, "router") or error from error
        if result is None:
            raise StageUnavailable("router", "the stream ended without a result")
        return _drawn(result)

    async def catalogue(self) -> cachemgr_pb2.ListModelsResponse:
        """Models and LoRAs."""
        found: cachemgr_pb2.ListModelsResponse = await _answer(
            self._cache_manager().ListModels(cachemgr_pb2.ListModelsRequest(), timeout=_QUESTION_TIMEOUT_S)
        )
        return found

    async def replicas(self) -> list[ReplicaReport]:
        """Every stage replica that is up, each asked for its state."""
        response = await self.cache()
        states = await asyncio.gather(*(self._describe(replica.address) for replica in response.replicas))
        return [ReplicaReport(replica, state) for replica, state in zip(response.replicas, states, strict=True)]

    async def cache(self) -> cachemgr_pb2.DescribeCacheResponse:
        """What replicas hold, tier by tier, what is asked for, and the plan."""
        found: cachemgr_pb2.DescribeCacheResponse = await _answer(
            self._cache_manager().DescribeCache(cachemgr_pb2.DescribeCacheRequest(), timeout=_QUESTION_TIMEOUT_S)
        )
        return found

    async def prefetch(
        self, model_id: str, *, tier: str = "device", stage: str = "", replica_id: str = "", copy_count: int = 1
    ) -> None:
        """Asks for a model to be brought near; `tier`: device, host or disk. Replicas do it when they are idle."""
        request = cachemgr_pb2.PrefetchRequest(
            model_id=model_id,
            tier=f"TIER_{tier.upper()}",
            stage=f"STAGE_{(stage or 'unspecified').upper()}",
            replica_id=replica_id,
            copy_count=copy_count,
        )
        await _answer(self._cache_manager().Prefetch(request, timeout=_QUESTION_TIMEOUT_S))

    async def pin(self, model_id: str, *, copy_count: int = 1) -> None:
        """Keeps a model on the devices of so many replicas of each stage; 0 means all."""
        request = cachemgr_pb2.PinRequest(model_id=model_id, copy_count=copy_count)
        await _answer(self._cache_manager().Pin(request, timeout=_QUESTION_TIMEOUT_S))

    async def unpin(self, model_id: str) -> None:
        """Ends a pin."""
        request = cachemgr_pb2.PinRequest(model_id=model_id, unpin=True)
        await _answer(self._cache_manager().Pin(request, timeout=_QUESTION_TIMEOUT_S))

    async def drop(self, model_id: str, *, stage: str = "", replica_id: str = "") -> None:
        """Asks replicas to let a model go once no request uses it."""
        request = cachemgr_pb2.DropRequest(
            model_id=model_id, stage=f"STAGE_{(stage or 'unspecified').upper()}", replica_id=replica_id
        )
        await _answer(self._cache_manager().Drop(request, timeout=_QUESTION_TIMEOUT_S))

    def _cache_manager(self) -> cachemgr_pb2_grpc.CacheManagerServiceStub:
        return cachemgr_pb2_grpc.CacheManagerServiceStub(self._channels.to(self._cachemgr))

    async def _describe(self, address: str) -> stage_pb2.DescribeReplicaResponse | None:
        stub = stage_pb2_grpc.StageServiceStub(self._channels.to(address))
        try:
            answer: stage_pb2.DescribeReplicaResponse = await stub.DescribeReplica(
                stage_pb2.DescribeReplicaRequest(), timeout=_QUESTION_TIMEOUT_S
            )
        except grpc.aio.AioRpcError:
            return None  # shown as not answering
        return answer


async def _answer(call: Awaitable[Any]) -> Any:
    """The cache manager's answer. Raises DarkroomError."""
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error, "cachemgr") or error from error


def stage_name(stage: int) -> str:
    """The stage's name as logs and flags have it."""
    return stage_pb2.Stage.Name(stage).removeprefix("STAGE_").lower()


def _request(drawing: Drawing) -> router_pb2.GenerateRequest:
    request = router_pb2.GenerateRequest(
        request_id=drawing.request_id,
        model_id=drawing.model_id,
        prompt=drawing.prompt,
        negative_prompt=drawing.negative_prompt,
        width_px=drawing.width_px,
        height_px=drawing.height_px,
        step_count=drawing.step_count,
        guidance_scale=drawing.guidance_scale,
        seed=drawing.seed,
        image_count=drawing.image_count,
        scheduler=drawing.scheduler,
        deterministic=drawing.deterministic,
        loras=[lora_pb2.Lora(lora_id=lora_id, scale=scale) for lora_id, scale in drawing.loras],
        step_cache_threshold=drawing.step_cache_threshold,
        preview_interval=drawing.preview_interval,
        frame_count=drawing.frame_count,
        priority=drawing.priority,
        tenant=drawing.tenant,
    )
    fill(request, drawing.conditions)
    return request


def _drawn(result: router_pb2.GenerateResult) -> Drawn:
    stages = tuple(
        StageTime(
            stage=stage_name(t.stage),
            replica_id=t.replica_id,
            call_s=seconds(t.call_duration),
            run_s=seconds(t.run_duration),
            attempt_count=t.attempt_count,
        )
        for t in result.timings
    )
    return Drawn(
        images=tuple(image.data for image in result.images),
        seed=result.seed,
        stages=stages,
        total_s=seconds(result.total_duration),
        batched_forward_count=result.batched_forward_count,
        cached_forward_count=result.cached_forward_count,
    )
