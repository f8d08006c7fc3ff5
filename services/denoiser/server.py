"""DenoiserService: message to task, one domain call, values to messages."""

import contextlib
import time
from collections.abc import AsyncIterator

import grpc

from darkroom.runtime.exchange import TensorShelf
from darkroom.runtime.server import time_left_s
from darkroom.v1 import denoiser_pb2, denoiser_pb2_grpc, vae_pb2
from darkroom.wire.checkpoints import checkpoint_message
from darkroom.wire.tasks import parse_denoise
from darkroom.wire.times import duration
from services.denoiser.denoising import Alive, Denoising, Event, Step


class DenoiserServicer(denoiser_pb2_grpc.DenoiserServiceServicer):
    """Serves a `Denoising`."""

    def __init__(self, denoising: Denoising, shelf: TensorShelf) -> None:
        self._denoising, self._shelf = denoising, shelf

    async def Denoise(
        self, request: denoiser_pb2.DenoiseRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[denoiser_pb2.DenoiseResponse]:
        """Denoises one request."""
        start_s = time.monotonic()
        task, deadline_s = parse_denoise(request), start_s + time_left_s(context)
        async with contextlib.aclosing(self._denoising.denoise(task, deadline_s)) as events:
            async for event in events:
                yield self._message(event, time.monotonic() - start_s)

    def _message(self, event: Event, run_s: float) -> denoiser_pb2.DenoiseResponse:
        if isinstance(event, Alive):
            return denoiser_pb2.DenoiseResponse(alive=denoiser_pb2.DenoiseAlive(started=event.started))
        if isinstance(event, Step):
            checkpoint = checkpoint_message(event.checkpoint) if event.checkpoint else None
            return denoiser_pb2.DenoiseResponse(
                progress=denoiser_pb2.DenoiseProgress(
                    step=event.step,
                    step_count=event.step_count,
                    checkpoint=checkpoint,
                    previews=[
                        vae_pb2.Image(format=vae_pb2.IMAGE_FORMAT_JPEG, data=preview) for preview in event.previews
                    ],
                )
            )
        return denoiser_pb2.DenoiseResponse(
            result=denoiser_pb2.DenoiseResult(
                latents=self._shelf.publish(event.latents),
                run_duration=duration(run_s),
                forward_count=event.forward_count,
                batched_forward_count=event.batched_forward_count,
                pushed_out_count=event.pushed_out_count,
                cached_forward_count=event.cached_forward_count,
            )
        )
