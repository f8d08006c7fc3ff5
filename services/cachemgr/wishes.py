"""Takes operators' wishes down in the registry, where the leader finds them, whoever leads."""

import secrets
from collections.abc import Callable

from darkroom.errors import ModelNotFound, QueueFull, RegistryUnavailable
from darkroom.policy.planning import Pin, Wish
from darkroom.registry import keys
from darkroom.registry.cache_plan import pin_json, wish_json
from darkroom.registry.membership import ClusterView
from darkroom.registry.port import Registry

WISH_S = 600.0
"""How long a wish waits for a leader, and for a replica that could grant it."""
_MAX_WISHES = 256
_MAX_PINS = 256
_RETRY_AFTER_S = "10"


class Wishes:
    """Every method raises RegistryUnavailable, ModelNotFound, or QueueFull when too much waits already."""

    def __init__(self, registry: Registry, view: ClusterView, *, clock: Callable[[], float]) -> None:
        self._registry, self._view, self._clock = registry, view, clock

    def until_s(self) -> float:
        """When a wish that is made now lapses."""
        return self._clock() + WISH_S

    async def ask(self, wish: Wish) -> None:
        """Keeps a wish until it is granted or lapses."""
        self._check_model(wish.model_id)
        await self._check_room(keys.WISHES, _MAX_WISHES)
        await self._registry.put(keys.wish(secrets.token_hex(8)), wish_json(wish))

    async def pin(self, pin: Pin) -> None:
        """Keeps a pin, in place of an earlier one of the model."""
        self._check_model(pin.model_id)
        await self._check_room(keys.PINS, _MAX_PINS)
        await self._registry.put(keys.pin(pin.model_id), pin_json(pin))

    async def unpin(self, model_id: str) -> None:
        """Ends a pin, also of a model that is gone."""
        await self._registry.delete(keys.pin(model_id))

    def _check_model(self, model_id: str) -> None:
        if not self._view.is_ready:
            raise RegistryUnavailable("the cluster's state was not read yet")
        if self._view.model(model_id) is None:
            raise ModelNotFound(model_id)

    async def _check_room(self, prefix: str, most: int) -> None:
        if len(await self._registry.read(prefix)) >= most:
            raise QueueFull(str(most), _RETRY_AFTER_S)
