"""EncoderService: message to task, one domain call, value to message."""

import time

import grpc

from darkroom.runtime.exchange import TensorShelf
from darkroom.v1 import encoder_pb2, encoder_pb2_grpc, tensor_pb2
from darkroom.wire.tasks import parse_encode
from darkroom.wire.times import duration
from services.encoder.encoding import Encoding


class EncoderServicer(encoder_pb2_grpc.EncoderServiceServicer):
    """Serves an `Encoding`."""

    def __init__(self, encoding: Encoding, shelf: TensorShelf) -> None:
        self._encoding, self._shelf = encoding, shelf

    async def Encode(
        self, request: encoder_pb2.EncodeRequest, context: grpc.aio.ServicerContext
    ) -> encoder_pb2.EncodeResponse:
        """Encodes one prompt."""
        del context
        start_s = time.monotonic()
        encoded = await self._encoding.encode(parse_encode(request))
        embeddings = [
            tensor_pb2.NamedTensor(name=n, tensor=self._shelf.publish(t)) for n, t in encoded.embeddings.items()
        ]
        return encoder_pb2.EncodeResponse(
            embeddings=embeddings, cached=encoded.cached, run_duration=duration(time.monotonic() - start_s)
        )
