"""What every registry promises, asked of each kind."""

import asyncio

import pytest

from darkroom.errors import RegistryUnavailable
from darkroom.registry.port import LeaseId, Registry
from tests.registry.following import until, watching


async def test_what_is_put_is_read_under_its_prefix_and_no_other(registry: Registry) -> None:
    await registry.put("/a/1", b"one")
    await registry.put("/a/2", b"\x00\xff")
    await registry.put("/ab/3", b"three")

    assert await registry.read("/a/") == {"/a/1": b"one", "/a/2": b"\x00\xff"}
    assert await registry.read("/b/") == {}


async def test_a_second_put_replaces_the_first(registry: Registry) -> None:
    await registry.put("/a/1", b"one")
    await registry.put("/a/1", b"two")

    assert await registry.read("/a/") == {"/a/1": b"two"}


async def test_deleting_removes_one_key_and_may_be_repeated(registry: Registry) -> None:
    await registry.put("/a/1", b"one")
    await registry.put("/a/11", b"eleven")

    await registry.delete("/a/1")
    await registry.delete("/a/1")

    assert await registry.read("/a/") == {"/a/11": b"eleven"}


async def test_revoking_a_lease_removes_its_keys_only(registry: Registry) -> None:
    lease, other = await registry.grant(10), await registry.grant(10)
    await registry.put("/a/1", b"one", lease=lease)
    await registry.put("/a/2", b"two", lease=other)
    await registry.put("/a/3", b"three")

    await registry.revoke(lease)
    await registry.revoke(lease)

    assert await registry.read("/a/") == {"/a/2": b"two", "/a/3": b"three"}


async def test_a_key_put_again_under_another_lease_outlives_the_first(registry: Registry) -> None:
    first, second = await registry.grant(10), await registry.grant(10)
    await registry.put("/a/1", b"one", lease=first)
    await registry.put("/a/2", b"two", lease=first)
    await registry.put("/a/1", b"one", lease=second)
    await registry.put("/a/2", b"two")

    await registry.revoke(first)

    assert await registry.read("/a/") == {"/a/1": b"one", "/a/2": b"two"}


async def test_a_lease_that_nobody_keeps_alive_ends(registry: Registry) -> None:
    lease = await registry.grant(1)
    await registry.put("/a/1", b"one", lease=lease)

    async with watching(registry, "/a/") as states:
        await until(lambda: states[-1] == {}, within_s=4.0)

    assert await registry.keep_alive(lease) == 0


async def test_a_lease_kept_alive_goes_on(registry: Registry) -> None:
    lease = await registry.grant(1)
    await registry.put("/a/1", b"one", lease=lease)

    for _ in range(4):
        await asyncio.sleep(0.4)
        assert 0 < await registry.keep_alive(lease) <= 2

    assert await registry.read("/a/") == {"/a/1": b"one"}


async def test_nothing_is_put_under_a_lease_that_has_ended(registry: Registry) -> None:
    lease = await registry.grant(10)
    await registry.revoke(lease)

    assert await registry.keep_alive(lease) == 0
    with pytest.raises(RegistryUnavailable):
        await registry.put("/a/1", b"one", lease=lease)
    assert await registry.read("/a/") == {}


async def test_a_lease_never_granted_has_ended(registry: Registry) -> None:
    assert await registry.keep_alive(LeaseId(123456)) == 0


async def test_a_watch_yields_the_state_at_once_and_after_each_change(registry: Registry) -> None:
    await registry.put("/a/1", b"one")

    async with watching(registry, "/a/") as states:
        assert states == [{"/a/1": b"one"}]
        await registry.put("/a/2", b"two")
        await until(lambda: states[-1] == {"/a/1": b"one", "/a/2": b"two"})
        await registry.delete("/a/1")
        await until(lambda: states[-1] == {"/a/2": b"two"})
        await registry.put("/b/1", b"elsewhere")
        await registry.put("/a/2", b"three")
        await until(lambda: states[-1] == {"/a/2": b"three"})

    assert len(states) == 4


async def test_a_watch_of_nothing_yields_nothing_there(registry: Registry) -> None:
    async with watching(registry, "/a/") as states:
        assert states == [{}]


async def test_watches_do_not_disturb_one_another(registry: Registry) -> None:
    async with watching(registry, "/a/") as first, watching(registry, "/a/") as second:
        first[0]["/a/0"] = b"scribbled by a caller"
        await registry.put("/a/1", b"one")
        await until(lambda: first[-1] == second[-1] == {"/a/1": b"one"})


async def test_a_watch_sees_the_end_of_many_changes(registry: Registry) -> None:
    async with watching(registry, "/a/") as states:
        for number in range(200):
            await registry.put(f"/a/{number % 20}", str(number).encode())
        wanted = {f"/a/{number % 20}": str(number).encode() for number in range(180, 200)}
        await until(lambda: states[-1] == wanted)


async def test_a_watch_that_is_cancelled_leaves_the_registry_usable(registry: Registry) -> None:
    async with watching(registry, "/a/"):
        pass

    await registry.put("/a/1", b"one")
    assert await registry.read("/a/") == {"/a/1": b"one"}
