"""CacheManagerService: message to question, one domain call, answer to message."""

import grpc

from darkroom.registry.catalogue import GuideEntry, LoraEntry, ModelEntry
from darkroom.v1 import cachemgr_pb2, cachemgr_pb2_grpc, stage_pb2
from darkroom.wire import fields
from services.cachemgr.holdings import Holding, Holdings


class CacheManagerServicer(cachemgr_pb2_grpc.CacheManagerServiceServicer):
    """Serves `Holdings`."""

    def __init__(self, holdings: Holdings) -> None:
        self._holdings = holdings

    async def ListModels(
        self, request: cachemgr_pb2.ListModelsRequest, context: grpc.aio.ServicerContext
    ) -> cachemgr_pb2.ListModelsResponse:
        """Lists the catalogue."""
        del request, context
        return cachemgr_pb2.ListModelsResponse(
            models=[_model(entry) for entry in self._holdings.models()],
            loras=[_lora(entry) for entry in self._holdings.loras()],
            guides=[_guide(entry) for entry in self._holdings.guides()],
        )

    async def Locate(
        self, request: cachemgr_pb2.LocateRequest, context: grpc.aio.ServicerContext
    ) -> cachemgr_pb2.LocateResponse:
        """Says where a model is."""
        del context
        location = self._holdings.locate(fields.check_model_id(request.model_id), _stage_name(request.stage))
        return cachemgr_pb2.LocateResponse(
            replicas=[_replica(h) for h in location.holdings], holder_count=location.holder_count
        )

    async def DescribeCache(
        self, request: cachemgr_pb2.DescribeCacheRequest, context: grpc.aio.ServicerContext
    ) -> cachemgr_pb2.DescribeCacheResponse:
        """Describes every stage replica."""
        del request, context
        return cachemgr_pb2.DescribeCacheResponse(replicas=[_replica(holding) for holding in self._holdings.describe()])


def _stage_name(stage: int) -> str:
    names = {value: name.removeprefix("STAGE_").lower() for name, value in stage_pb2.Stage.items()}
    return names.get(stage, "unknown")


def _replica(holding: Holding) -> cachemgr_pb2.Replica:
    member = holding.member
    stage = f"STAGE_{member.stage.upper()}"
    return cachemgr_pb2.Replica(
        replica_id=member.replica_id,
        stage=stage,
        address=member.address,
        device=member.device,
        model_ids=holding.model_ids,
    )


def _lora(entry: LoraEntry) -> cachemgr_pb2.LoraModel:
    return cachemgr_pb2.LoraModel(
        lora_id=entry.lora_id,
        base_model_id=entry.base_model or "",
        default_scale=entry.default_scale,
        size_bytes=entry.size_bytes,
    )


def _guide(entry: GuideEntry) -> cachemgr_pb2.GuideModel:
    return cachemgr_pb2.GuideModel(
        guide_id=entry.guide_id,
        role=f"ROLE_{entry.role.upper()}",
        pipelines=entry.pipelines,
        base_model_id=entry.base_model or "",
        size_bytes=entry.size_bytes,
    )


def _model(entry: ModelEntry) -> cachemgr_pb2.Model:
    return cachemgr_pb2.Model(
        model_id=entry.model_id,
        pipeline=entry.pipeline,
        components=[cachemgr_pb2.Component(name=c.name, size_bytes=c.size_bytes) for c in entry.components],
        schedulers=entry.schedulers,
        default_width_px=entry.default_width_px,
        default_height_px=entry.default_height_px,
        size_multiple_px=entry.size_multiple_px,
        default_step_count=entry.default_step_count,
        default_guidance_scale=entry.default_guidance_scale,
    )
