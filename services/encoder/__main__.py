"""Wires the encoder together: `python -m services.encoder`."""

import gc

gc.disable()  # until `StageProcess` serves: imports make half a million objects, and hardly any garbage

import asyncio
from functools import partial

import torch

from darkroom.models.image_encoders import image_encoder_sizes, is_ip_adapter, load_image_encoder
from darkroom.models.lone import OnDemand
from darkroom.models.networks import Held
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
    device = torch.device(config.device)
    images = OnDemand(
        partial(load_image_encoder, process.store, device=device),
        measure=partial(image_encoder_sizes, process.store, device=device),
    )
    process.replica.share(images)

    async def held(model_id: str) -> Held:
        if model_id in process.replica:
            return await process.replica.part(model_id)
        is_alone = model_id in images or await asyncio.to_thread(is_ip_adapter, process.store, model_id)
        return await (images.get(model_id) if is_alone else process.replica.part(model_id))

    await process.run(
        Mounted(
            lambda server: encoder_pb2_grpc.add_EncoderServiceServicer_to_server(servicer, server),
            "darkroom.v1.EncoderService",
        ),
        held=held,
    )


if __name__ == "__main__":
    asyncio.run(main(read_config(EncoderConfig, program="encoder")))
