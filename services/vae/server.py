"""VaeService: message to task, one domain call, values to messages."""

import time

import grpc

from darkroom.v1 import vae_pb2, vae_pb2_grpc
from darkroom.wire.tasks import parse_decode
from darkroom.wire.times import duration
from services.vae.decoding import Decoding, ImageFile


class VaeServicer(vae_pb2_grpc.VaeServiceServicer):
    """Serves a `Decoding`."""

    def __init__(self, decoding: Decoding) -> None:
        self._decoding = decoding

    async def Decode(self, request: vae_pb2.DecodeRequest, context: grpc.aio.ServicerContext) -> vae_pb2.DecodeResponse:
        """Decodes latents and encodes the image files."""
        del context
        start_s = time.monotonic()
        files = await self._decoding.decode(parse_decode(request))
        return vae_pb2.DecodeResponse(
            images=[_image_message(file) for file in files], run_duration=duration(time.monotonic() - start_s)
        )


def _image_message(file: ImageFile) -> vae_pb2.Image:
    return vae_pb2.Image(
        format=vae_pb2.IMAGE_FORMAT_PNG, data=file.data, width_px=file.width_px, height_px=file.height_px
    )
