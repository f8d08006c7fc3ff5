"""Wires the denoiser together: `python -m services.denoiser`."""

import asyncio

from darkroom.runtime.config import read_config
from darkroom.runtime.server import Mounted
from darkroom.runtime.stage import StageProcess
from darkroom.v1 import denoiser_pb2_grpc
from services.denoiser.config import DenoiserConfig
from services.denoiser.denoising import Denoising
from services.denoiser.server import DenoiserServicer


async def main(config: DenoiserConfig) -> None:
    """Serves until SIGTERM."""
    process = StageProcess("denoiser", config)
    servicer = DenoiserServicer(Denoising(process.replica, process.source), process.shelf)
    await process.run(
        Mounted(
            lambda server: denoiser_pb2_grpc.add_DenoiserServiceServicer_to_server(servicer, server),
            "darkroom.v1.DenoiserService",
        )
    )


if __name__ == "__main__":
    asyncio.run(main(read_config(DenoiserConfig, program="denoiser")))
