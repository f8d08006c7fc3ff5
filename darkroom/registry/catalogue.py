"""The catalogue of models, LoRAs and guides: from the model store into the registry. Import its names from here."""

from collections.abc import Iterable

from darkroom.registry import keys
from darkroom.registry.model_entry import (
    CONTROLNET,
    IP_ADAPTER,
    ComponentEntry,
    Entry,
    GuideEntry,
    LoraEntry,
    ModelEntry,
)
from darkroom.registry.model_store import StoreListing, read_model_store
from darkroom.registry.port import Keys

__all__ = [
    "CONTROLNET",
    "IP_ADAPTER",
    "ComponentEntry",
    "Entry",
    "GuideEntry",
    "LoraEntry",
    "ModelEntry",
    "StoreListing",
    "publish_catalogue",
    "read_model_store",
]


async def publish_catalogue(registry: Keys, entries: Iterable[Entry]) -> None:
    """Makes the registry's catalogue equal to `entries`, writing only what differs.

    Raises RegistryUnavailable, or Deposed where `registry` is a leader's.
    """
    wanted = {keys.model(entry.entry_id): entry.to_json() for entry in entries}
    held = await registry.read(keys.MODELS)
    for key, value in wanted.items():
        if held.get(key) != value:
            await registry.put(key, value)
    for key in held.keys() - wanted.keys():
        await registry.delete(key)
