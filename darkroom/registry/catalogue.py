"""The catalogue of models: from the model store into the registry. The names to import for either are here."""

from collections.abc import Iterable

from darkroom.registry import keys
from darkroom.registry.model_entry import ComponentEntry, ModelEntry
from darkroom.registry.model_store import StoreListing, read_model_store
from darkroom.registry.port import Registry

__all__ = ["ComponentEntry", "ModelEntry", "StoreListing", "publish_catalogue", "read_model_store"]


async def publish_catalogue(registry: Registry, models: Iterable[ModelEntry]) -> None:
    """Makes the registry's catalogue equal to `models`, writing only what differs. Raises RegistryUnavailable."""
    wanted = {keys.model(entry.model_id): entry.to_json() for entry in models}
    held = await registry.read(keys.MODELS)
    for key, value in wanted.items():
        if held.get(key) != value:
            await registry.put(key, value)
    for key in held.keys() - wanted.keys():
        await registry.delete(key)
