"""What the etcd client does when etcd is away, frozen, restarted, compacted or empty again."""

import asyncio
import time
from contextlib import aclosing

import pytest

from darkroom.errors import RegistryUnavailable
from darkroom.registry.etcd import EtcdRegistry
from darkroom.registry.etcd_connection import EtcdConnection
from darkroom.registry.etcd_watch import _changes
from darkroom.runtime.processes import free_port
from tests.registry.etcd_process import EtcdProcess
from tests.registry.following import until, watching
from tests.registry.line import Line


async def test_an_etcd_that_is_down_is_said_to_be_away_at_once() -> None:
    registry = EtcdRegistry([f"127.0.0.1:{free_port()}"])
    started_s = time.monotonic()

    with pytest.raises(RegistryUnavailable):
        await registry.read("/a/")
    with pytest.raises(RegistryUnavailable):
        await registry.grant(5)

    assert time.monotonic() - started_s < 2
    await registry.close()


async def test_a_closed_client_says_so_even_to_its_watches(shared_etcd: EtcdProcess) -> None:
    registry = EtcdRegistry([shared_etcd.endpoint])
    watch = registry.watch("/closed/")
    assert await anext(watch) == {}
    following = asyncio.create_task(anext(watch))
    await asyncio.sleep(0.2)

    await registry.close()

    with pytest.raises(RegistryUnavailable, match="closed"):
        await registry.read("/closed/")
    with pytest.raises(RegistryUnavailable, match="closed"):
        await following


async def test_a_watch_can_be_cancelled_at_any_moment(shared_etcd: EtcdProcess) -> None:
    registry = EtcdRegistry([shared_etcd.endpoint])
    await registry.put("/any/1", b"one")

    async def follow() -> None:
        async for _ in registry.watch("/any/"):
            pass

    for number in range(300):
        following = asyncio.create_task(follow())
        await asyncio.sleep(0.00002 * number)
        following.cancel()
        _, pending = await asyncio.wait({following}, timeout=2)
        assert not pending
    await registry.close()


async def test_a_host_name_is_an_endpoint(shared_etcd: EtcdProcess) -> None:
    registry = EtcdRegistry([shared_etcd.endpoint.replace("127.0.0.1", "localhost")])
    await registry.put("/name/1", b"one")
    assert await registry.read("/name/") == {"/name/1": b"one"}
    await registry.close()


async def test_the_next_endpoint_serves_when_one_is_down(shared_etcd: EtcdProcess) -> None:
    registry = EtcdRegistry([f"127.0.0.1:{free_port()}", shared_etcd.endpoint])
    async with watching(registry, "/next/") as states:
        await registry.put("/next/1", b"one")
        await until(lambda: states[-1] == {"/next/1": b"one"})
    await registry.close()


async def test_a_frozen_etcd_costs_a_call_its_deadline(etcd: EtcdProcess) -> None:
    registry = EtcdRegistry([etcd.endpoint], deadline_s=0.5)
    lease = await registry.grant(60)
    etcd.freeze()
    try:
        started_s = time.monotonic()
        with pytest.raises(RegistryUnavailable):
            await registry.put("/a/1", b"one")
        with pytest.raises(RegistryUnavailable):
            await registry.keep_alive(lease)
        assert 0.9 < time.monotonic() - started_s < 1.5
    finally:
        etcd.thaw()
    await registry.put("/a/1", b"one")
    await registry.close()


async def test_a_watch_begun_while_etcd_is_down_waits_for_it(etcd: EtcdProcess) -> None:
    etcd.stop()
    registry = EtcdRegistry([etcd.endpoint])
    start_later = asyncio.get_running_loop().call_later(1.0, etcd.start)
    async with watching(registry, "/a/") as states:
        assert states == [{}]
    start_later.cancel()
    await registry.close()


async def test_a_watch_goes_on_after_a_restart(etcd: EtcdProcess, etcd_registry: EtcdRegistry) -> None:
    await etcd_registry.put("/a/1", b"one")
    async with watching(etcd_registry, "/a/") as states:
        etcd.stop()
        await asyncio.sleep(1.5)
        await asyncio.to_thread(etcd.start)
        await asyncio.to_thread(etcd.control, "put", "/a/2", "two")
        assert await until(lambda: states[-1] == {"/a/1": b"one", "/a/2": b"two"}) < 2
        await etcd_registry.delete("/a/1")
        await until(lambda: states[-1] == {"/a/2": b"two"})


async def test_a_watch_cut_off_misses_nothing_that_happened_meanwhile(etcd_registry: EtcdRegistry, line: Line) -> None:
    watcher = EtcdRegistry([await line.open()])
    async with watching(watcher, "/a/") as states:
        line.cut()
        await asyncio.sleep(0.3)
        await etcd_registry.put("/a/1", b"come and gone")
        await etcd_registry.delete("/a/1")
        await etcd_registry.put("/a/2", b"stays")
        line.mend()
        await until(lambda: states[-1] == {"/a/2": b"stays"})
    await watcher.close()


async def test_a_watch_lists_anew_after_what_it_missed_was_compacted(
    etcd: EtcdProcess, etcd_registry: EtcdRegistry, line: Line
) -> None:
    await etcd_registry.put("/a/1", b"goes")
    await etcd_registry.put("/a/2", b"stays")
    watcher = EtcdRegistry([await line.open()])
    async with watching(watcher, "/a/") as states:
        line.cut()
        await asyncio.sleep(0.3)
        await etcd_registry.delete("/a/1")
        await etcd_registry.put("/a/3", b"comes")
        await etcd_registry.put("/elsewhere", b"so that the last change is compacted too")
        revision = int(etcd.control("get", "/elsewhere", "-w", "fields").split('"Revision" : ')[1].split()[0])
        etcd.control("compact", str(revision))
        line.mend()
        await until(lambda: states[-1] == {"/a/2": b"stays", "/a/3": b"comes"})
        await etcd_registry.put("/a/4", b"later")
        await until(lambda: "/a/4" in states[-1])
    await watcher.close()


async def test_a_stream_that_etcd_cannot_follow_is_lost_and_not_silent(etcd: EtcdProcess) -> None:
    connection = EtcdConnection([etcd.endpoint], deadline_s=3.0)
    for number in range(5):
        etcd.control("put", "/a/1", str(number))
    reached = (await connection.list("/a/")).revision
    etcd.control("compact", str(reached))

    for revision, why in ((reached - 2, "compacted"), (reached + 100, "lost")):
        async with asyncio.timeout(5), aclosing(_changes(connection, "/a/", revision)) as changes:
            with pytest.raises(RegistryUnavailable, match=why):
                await anext(changes)
    await connection.close()


async def test_a_watch_lists_anew_after_etcd_lost_its_data(etcd: EtcdProcess, etcd_registry: EtcdRegistry) -> None:
    for number in range(5):
        await etcd_registry.put(f"/a/{number}", b"lost")
    async with watching(etcd_registry, "/a/") as states:
        etcd.stop()
        etcd.wipe()
        await asyncio.to_thread(etcd.start)
        await until(lambda: states[-1] == {})
        await etcd_registry.put("/a/new", b"new")
        await until(lambda: states[-1] == {"/a/new": b"new"})


async def test_a_watch_sees_that_data_was_lost_even_if_revisions_have_grown_past_its_own(
    etcd: EtcdProcess, line: Line
) -> None:
    etcd.control("put", "/a/old", "lost")
    watcher = EtcdRegistry([await line.open()])
    async with watching(watcher, "/a/") as states:
        line.cut()
        etcd.stop()
        etcd.wipe()
        await asyncio.to_thread(etcd.start)
        direct = EtcdRegistry([etcd.endpoint])
        for number in range(10):
            await direct.put("/a/new", str(number).encode())
        await direct.close()
        line.mend()
        await until(lambda: states[-1] == {"/a/new": b"9"})
    await watcher.close()


async def test_a_watch_leaves_a_frozen_etcd_for_another_endpoint(etcd: EtcdProcess, line: Line) -> None:
    through_line = await line.open()
    registry = EtcdRegistry([through_line, etcd.endpoint])
    async with watching(registry, "/a/") as states:
        await asyncio.sleep(0.5)  # until gRPC's own pings, sent when data came, are answered
        line.stall()
        await asyncio.to_thread(etcd.control, "put", "/a/1", "one")
        assert await until(lambda: states[-1] == {"/a/1": b"one"}, within_s=8.0) < 5
    await registry.close()


async def test_a_watch_notices_a_network_that_drops_everything(etcd: EtcdProcess, line: Line) -> None:
    registry = EtcdRegistry([await line.open()])
    async with watching(registry, "/a/") as states:
        line.stall()
        await asyncio.to_thread(etcd.control, "put", "/a/1", "one")
        await asyncio.sleep(3.5)
        assert states == [{}]
        line.cut()
        line.flow()
        line.mend()
        assert await until(lambda: states[-1] == {"/a/1": b"one"}) < 3
    await registry.close()


async def test_an_idle_watch_stays_open(shared_etcd: EtcdProcess) -> None:
    registry = EtcdRegistry([shared_etcd.endpoint])
    await registry.put("/idle/1", b"one")
    async with watching(registry, "/idle/") as states:
        await asyncio.sleep(1.5)
        started_s = time.monotonic()
        await registry.put("/idle/1", b"two")
        await until(lambda: states[-1] == {"/idle/1": b"two"})
        assert time.monotonic() - started_s < 0.15
    await registry.close()
