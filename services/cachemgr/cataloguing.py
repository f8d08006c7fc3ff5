"""Keeps the catalogue equal to the model store."""

import asyncio

import structlog

from darkroom.errors import Deposed, RegistryUnavailable, StoreUnavailable
from darkroom.registry.catalogue import publish_catalogue
from darkroom.registry.election import Election
from darkroom.registry.listing import Listings

_log = structlog.get_logger()


async def keep_catalogue(election: Election, listings: Listings, *, interval_s: float) -> None:
    """Reads the store and publishes what it holds, every `interval_s` while it leads, until cancelled.

    While a store cannot be read, what it held before stays published: nodes that have files of it go on.
    """
    said: dict[str, str] = {}
    while True:
        await election.elected()
        try:
            listing = await asyncio.to_thread(listings.read)
        except StoreUnavailable as error:
            _log.warning("store_not_read", problem=error.message)
            await asyncio.sleep(interval_s)
            continue
        refused = dict(listing.refused)
        for folder, problem in refused.items():
            if said.get(folder) != problem:
                _log.warning("model_refused", folder=folder[:64], problem=problem)
        said = refused
        try:
            await publish_catalogue(await election.elected(), listing.entries)
        except (RegistryUnavailable, Deposed) as error:
            _log.warning("catalogue_not_published", problem=error.message)
        await asyncio.sleep(interval_s)
