"""Wires the denoiser together: `python -m services.denoiser`."""

import gc

gc.disable()  # until `StageProcess` serves: imports make half a million objects, and hardly any garbage

import asyncio

import torch

from darkroom.models.controlnets import ControlNets
from darkroom.models.ip_adapters import IpAdapters
from darkroom.runtime.config import read_config
from darkroom.runtime.server import Mounted
from darkroom.runtime.stage import StageProcess
from darkroom.v1 import denoiser_pb2_grpc
from services.denoiser.config import DenoiserConfig
from services.denoiser.denoising import Denoising
from services.denoiser.server import DenoiserServicer


async def main(config: DenoiserConfig) -> None:
    """Serves until SIGTERM."""
    process = StageProcess("controlnet" if config.controlnets_only else "denoiser", config)
    send = process.send if config.remote_controlnets else None
    controlnets = ControlNets(process.store, torch.device(config.device), send=send)
    if config.controlnets_only:
        await process.run_for_others(controlnets)
        return
    process.replica.share(controlnets)
    if config.merged_pairs:
        process.replica.keep_merged(config.merged_pairs, process.rooms.device_bytes)
    ip_adapters = IpAdapters(process.store, process.send)
    process.replica.on_dropped = ip_adapters.forget_model
    denoising = Denoising(process.replica, process.source, controlnets, ip_adapters)
    servicer = DenoiserServicer(denoising, process.shelf)
    await process.run(
        Mounted(
            lambda server: denoiser_pb2_grpc.add_DenoiserServiceServicer_to_server(servicer, server),
            "darkroom.v1.DenoiserService",
        ),
        controlnets=controlnets,
    )


if __name__ == "__main__":
    asyncio.run(main(read_config(DenoiserConfig, program="denoiser")))
