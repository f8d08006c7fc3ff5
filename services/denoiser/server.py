"""DenoiserService: message to task, one domain call, values to messages."""

import contextlib
import time
from collections.abc import AsyncIterator

import grpc

from darkroom.runtime.exchange import TensorShelf
from darkroom.v1 import denoiser_pb2, denoiser_pb2_grpc
from darkroom.wire.tasks import parse_denoise
from darkroom.wire.times import duration
from services.denoiser.denoising import Denoised, Denoising, StepDone


class DenoiserServicer(denoiser_pb2_grpc.DenoiserServiceServicer):
    """Serves a `Denoising`."""

    def __init__(self, denoising: Denoising, shelf: TensorShelf) -> None:
        self._denoising, self._shelf = denoising, shelf

    async def Denoise(
        self, request: denoiser_pb2.DenoiseRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[denoiser_pb2.DenoiseResponse]:
        """Denoises one request."""
        del context
        start_s = time.monotonic()
        async with contextlib.aclosing(self._denoising.denoise(parse_denoise(request))) as events:
            async for event in events:
                yield self._message(event, time.monotonic() - start_s)

    def _message(self, event: StepDone | Denoised, run_s: float) -> denoiser_pb2.DenoiseResponse:
        if isinstance(event, StepDone):
            return denoiser_pb2.DenoiseResponse(
                progress=denoiser_pb2.DenoiseProgress(step=event.step, step_count=event.step_count)
            )
        return denoiser_pb2.DenoiseResponse(
            result=denoiser_pb2.DenoiseResult(
                latents=self._shelf.publish(event.latents),
                run_duration=duration(run_s),
                forward_count=event.forward_count,
                batched_forward_count=event.batched_forward_count,
            )
        )
