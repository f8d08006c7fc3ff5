"""What only the registry in memory has: a way to cut everyone off."""

import pytest

from darkroom.errors import RegistryUnavailable
from darkroom.registry.memory import MemoryRegistry
from tests.registry.following import until, watching


async def test_a_registry_cut_off_answers_nobody_and_its_watches_wait() -> None:
    registry = MemoryRegistry()
    lease = await registry.grant(1)
    await registry.put("/a/1", b"one", lease=lease)

    async with watching(registry, "/a/") as states:
        registry.set_reachable(is_reachable=False)
        with pytest.raises(RegistryUnavailable):
            await registry.read("/a/")
        with pytest.raises(RegistryUnavailable):
            await registry.keep_alive(lease)
        with pytest.raises(TimeoutError):
            await until(lambda: len(states) > 1, within_s=1.2)
        registry.set_reachable(is_reachable=True)
        await until(lambda: states[-1] == {})
