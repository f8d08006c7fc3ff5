"""Keeps the catalogue equal to the model store's folder."""

import asyncio
from pathlib import Path

import structlog

from darkroom.errors import RegistryUnavailable
from darkroom.registry.catalogue import publish_catalogue, read_model_store
from darkroom.registry.port import Registry

_log = structlog.get_logger()


async def keep_catalogue(registry: Registry, model_store: Path, *, interval_s: float) -> None:
    """Reads the folder and publishes what it holds, every `interval_s`, until cancelled."""
    said: dict[str, str] = {}
    while True:
        listing = await asyncio.to_thread(read_model_store, model_store)
        refused = dict(listing.refused)
        for folder, problem in refused.items():
            if said.get(folder) != problem:
                _log.warning("model_refused", folder=folder[:64], problem=problem)
        said = refused
        try:
            await publish_catalogue(registry, listing.entries)
        except RegistryUnavailable as error:
            _log.warning("catalogue_not_published", problem=error.message)
        await asyncio.sleep(interval_s)
