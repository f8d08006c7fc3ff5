"""StageService, which every stage replica serves: what it is doing, and hints of what it will be asked for."""

from collections.abc import Callable

import grpc

from darkroom.models.preparing import Preparations
from darkroom.models.replica import ReplicaState, StageReplica
from darkroom.v1 import lora_pb2, stage_pb2, stage_pb2_grpc
from darkroom.wire.tasks import parse_prepare
from darkroom.wire.times import duration


class StageServicer(stage_pb2_grpc.StageServiceServicer):
    """StageService over a replica."""

    def __init__(self, replica: StageReplica, preparations: Preparations, is_draining: Callable[[], bool]) -> None:
        self._replica, self._preparations, self._is_draining = replica, preparations, is_draining

    async def DescribeReplica(
        self, request: stage_pb2.DescribeReplicaRequest, context: grpc.aio.ServicerContext
    ) -> stage_pb2.DescribeReplicaResponse:
        """Describes the replica."""
        del request, context
        return state_message(self._replica.state(), draining=self._is_draining())

    async def Prepare(
        self, request: stage_pb2.PrepareRequest, context: grpc.aio.ServicerContext
    ) -> stage_pb2.PrepareResponse:
        """Loads what a request will need."""
        del context
        return stage_pb2.PrepareResponse(found=await self._preparations.prepare(parse_prepare(request)))


def state_message(state: ReplicaState, *, draining: bool) -> stage_pb2.DescribeReplicaResponse:
    """A replica's state as its message."""
    models = []
    for part in state.parts:
        networks = [
            stage_pb2.Network(name=n.name, resident_bytes=n.resident_bytes, parameter_count=n.parameter_count)
            for n in part.network_states()
        ]
        models.append(
            stage_pb2.LoadedModel(
                model_id=part.model_id,
                networks=networks,
                load_duration=duration(part.load_s),
                merged_pairs=[
                    stage_pb2.MergedPair(
                        loras=[lora_pb2.Lora(lora_id=use.lora_id, scale=use.scale) for use in pair.loras],
                        size_bytes=pair.size_bytes,
                    )
                    for pair in state.merged.get(part.model_id, ())
                ],
            )
        )
    return stage_pb2.DescribeReplicaResponse(
        replica_id=state.replica_id,
        stage=f"STAGE_{state.stage.upper()}",
        device=state.device,
        models=models,
        running_count=state.running_count,
        finished_count=state.finished_count,
        batch_count=state.engine.batches,
        forward_count=state.engine.forwards,
        draining=draining,
        uptime_duration=duration(state.uptime_s),
    )
