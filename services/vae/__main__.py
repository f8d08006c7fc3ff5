"""Wires the VAE service together: `python -m services.vae`."""

import gc

gc.disable()  # until `StageProcess` serves: imports make half a million objects, and hardly any garbage

import asyncio

from darkroom.runtime.config import read_config
from darkroom.runtime.server import Mounted
from darkroom.runtime.stage import StageProcess
from darkroom.v1 import vae_pb2_grpc
from services.vae.config import VaeConfig
from services.vae.decoding import Decoding
from services.vae.server import VaeServicer


async def main(config: VaeConfig) -> None:
    """Serves until SIGTERM."""
    process = StageProcess("vae", config)
    servicer = VaeServicer(Decoding(process.replica, process.source))
    await process.run(
        Mounted(
            lambda server: vae_pb2_grpc.add_VaeServiceServicer_to_server(servicer, server), "darkroom.v1.VaeService"
        )
    )


if __name__ == "__main__":
    asyncio.run(main(read_config(VaeConfig, program="vae")))
