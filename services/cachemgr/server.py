"""CacheManagerService: message to question, one domain call, answer to message."""

import time
from collections.abc import AsyncIterator

import grpc

from darkroom.v1 import cachemgr_pb2, cachemgr_pb2_grpc, stage_pb2
from darkroom.wire import fields
from darkroom.wire.usage import parse_report
from services.cachemgr import messages
from services.cachemgr.manager import CacheManager


class CacheManagerServicer(cachemgr_pb2_grpc.CacheManagerServiceServicer):
    """Serves a `CacheManager`."""

    def __init__(self, manager: CacheManager) -> None:
        self._manager, self._holdings, self._wishes = manager, manager.holdings, manager.wishes

    async def ListModels(
        self, request: cachemgr_pb2.ListModelsRequest, context: grpc.aio.ServicerContext
    ) -> cachemgr_pb2.ListModelsResponse:
        """Lists the catalogue."""
        del request, context
        return cachemgr_pb2.ListModelsResponse(
            models=[messages.model_message(entry) for entry in self._holdings.models()],
            loras=[messages.lora_message(entry) for entry in self._holdings.loras()],
            guides=[messages.guide_message(entry) for entry in self._holdings.guides()],
        )

    async def Locate(
        self, request: cachemgr_pb2.LocateRequest, context: grpc.aio.ServicerContext
    ) -> cachemgr_pb2.LocateResponse:
        """Says where a model is."""
        del context
        location = self._holdings.locate(fields.check_model_id(request.model_id), _stage_name(request.stage))
        return cachemgr_pb2.LocateResponse(
            replicas=[messages.replica_message(h) for h in location.holdings], holder_count=location.holder_count
        )

    async def DescribeCache(
        self, request: cachemgr_pb2.DescribeCacheRequest, context: grpc.aio.ServicerContext
    ) -> cachemgr_pb2.DescribeCacheResponse:
        """Describes every stage replica, what is asked for, and the plan."""
        del request, context
        return cachemgr_pb2.DescribeCacheResponse(
            replicas=[messages.replica_message(holding) for holding in self._holdings.describe()],
            leader_id=self._manager.leader_id,
            manager_id=self._manager.manager_id,
            plan=messages.plan_message(self._holdings.plan()),
            popularities=[messages.popularity_message(asked) for asked in self._holdings.asked()],
            loras=[cachemgr_pb2.LoraPopularity(lora_id=n, rate=r) for n, r in self._holdings.asked_loras()],
            pins=[messages.pin_message(pin) for pin in self._manager.pins],
        )

    async def ReportUsage(
        self, request: cachemgr_pb2.ReportUsageRequest, context: grpc.aio.ServicerContext
    ) -> cachemgr_pb2.ReportUsageResponse:
        """Counts a report."""
        del context
        counted = self._manager.ledger.add(parse_report(request), time.time())
        return cachemgr_pb2.ReportUsageResponse(counted=counted)

    async def WatchPlan(
        self, request: cachemgr_pb2.WatchPlanRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[cachemgr_pb2.WatchPlanResponse]:
        """Streams the plan."""
        del request, context
        async for plan in self._holdings.plans():
            yield cachemgr_pb2.WatchPlanResponse(plan=messages.plan_message(plan))

    async def Prefetch(
        self, request: cachemgr_pb2.PrefetchRequest, context: grpc.aio.ServicerContext
    ) -> cachemgr_pb2.PrefetchResponse:
        """Keeps a wish for a model to be brought near."""
        del context
        await self._wishes.ask(messages.parse_prefetch(request, self._wishes.until_s()))
        return cachemgr_pb2.PrefetchResponse()

    async def Pin(
        self, request: cachemgr_pb2.PinRequest, context: grpc.aio.ServicerContext
    ) -> cachemgr_pb2.PinResponse:
        """Keeps a pin, or ends it."""
        del context
        pin = messages.parse_pin(request)
        await (self._wishes.unpin(pin.model_id) if request.unpin else self._wishes.pin(pin))
        return cachemgr_pb2.PinResponse()

    async def Drop(
        self, request: cachemgr_pb2.DropRequest, context: grpc.aio.ServicerContext
    ) -> cachemgr_pb2.DropResponse:
        """Keeps a wish for a model to go."""
        del context
        await self._wishes.ask(messages.parse_drop(request, self._wishes.until_s()))
        return cachemgr_pb2.DropResponse()


def _stage_name(stage: int) -> str:
    names = {value: name.removeprefix("STAGE_").lower() for name, value in stage_pb2.Stage.items()}
    return names.get(stage, "unknown")
