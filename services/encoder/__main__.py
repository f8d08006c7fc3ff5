"""Wires the encoder together: `python -m services.encoder`."""

import asyncio

from darkroom.runtime.config import read_config
from darkroom.runtime.server import Mounted
from darkroom.runtime.stage import StageProcess
from darkroom.v1 import encoder_pb2_grpc
from services.encoder.cache import EmbeddingCache
from services.encoder.config import EncoderConfig
from services.encoder.encoding import Encoding
from services.encoder.server import EncoderServicer


async def main(config: EncoderConfig) -> None:
    """Serves until SIGTERM."""
    process = StageProcess("encoder", config)
    encoding = Encoding(process.replica, EmbeddingCache(limit_bytes=config.embedding_cache_bytes))
    servicer = EncoderServicer(encoding, process.shelf)
    await process.run(
        Mounted(
            lambda server: encoder_pb2_grpc.add_EncoderServiceServicer_to_server(servicer, server),
            "darkroom.v1.EncoderService",
        )
    )


if __name__ == "__main__":
    asyncio.run(main(read_config(EncoderConfig, program="encoder")))
