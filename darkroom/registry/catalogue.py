"""The catalogue of models and LoRAs: from the model store into the registry. The names to import for it are here."""

from collections.abc import Iterable

from darkroom.registry import keys
from darkroom.registry.model_entry import ComponentEntry, LoraEntry, ModelEntry
from darkroom.registry.model_store import StoreListing, read_model_store
from darkroom.registry.port import Registry

__all__ = ["ComponentEntry", "LoraEntry", "ModelEntry", "StoreListing", "publish_catalogue", "read_model_store"]


async def publish_catalogue(registry: Registry, entries: Iterable[ModelEntry | LoraEntry]) -> None:
    """Makes the registry's catalogue equal to `entries`, writing only what differs. Raises RegistryUnavailable."""
    wanted = {
        keys.model(entry.model_id if isinstance(entry, ModelEntry) else entry.lora_id): entry.to_json()
        for entry in entries
    }
    held = await registry.read(keys.MODELS)
    for key, value in wanted.items():
        if held.get(key) != value:
            await registry.put(key, value)
    for key in held.keys() - wanted.keys():
        await registry.delete(key)
