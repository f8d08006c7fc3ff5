"""A replica stays registered through what happens to its lease, and everyone sees who is up."""

import asyncio
import json

import pytest

from darkroom.registry import keys
from darkroom.registry.catalogue import publish_catalogue
from darkroom.registry.etcd import EtcdRegistry
from darkroom.registry.membership import ClusterView, Registration
from darkroom.registry.memory import MemoryRegistry
from darkroom.registry.port import Member, Registry
from tests.registry.entries import make_entry, make_lora_entry
from tests.registry.etcd_process import EtcdProcess
from tests.registry.following import running, until

VAE = Member(replica_id="vae-1", stage="vae", address="10.0.0.1:7003", device="cpu")
ENCODER = Member(replica_id="encoder-1", stage="encoder", address="host-a:7001")


def sees_vae(view: ClusterView) -> bool:
    return view.members("vae") == (VAE,)


def sees_nobody(view: ClusterView) -> bool:
    return view.members() == ()


async def test_a_view_shows_who_registered_and_what_they_hold(registry: Registry) -> None:
    view = ClusterView(registry)
    vae, encoder = Registration(registry, VAE), Registration(registry, ENCODER)
    assert (view.is_ready, vae.is_registered) == (False, False)
    async with running(view.run()), running(vae.run()), running(encoder.run()), asyncio.timeout(5):
        await view.wait_for(lambda view: len(view.members()) == 2)
        await vae.set_models(["sd", "flux"])
        await view.wait_for(lambda view: view.models_of("vae-1") == ("flux", "sd"))
        await view.wait_for(lambda view: view.is_ready)

        assert vae.is_registered
        assert view.members() == (ENCODER, VAE)
        assert view.members("vae") == (VAE,)
        assert view.members("denoiser") == ()
        assert view.models_of("encoder-1") == ()


async def test_what_a_replica_holds_is_replaced_whole(registry: Registry) -> None:
    view, registration = ClusterView(registry), Registration(registry, VAE)
    await registration.set_models(["early"])
    async with running(view.run()), running(registration.run()), asyncio.timeout(5):
        await view.wait_for(lambda view: view.models_of("vae-1") == ("early",))
        await registration.set_models(["a", "b"])
        await view.wait_for(lambda view: view.models_of("vae-1") == ("a", "b"))
        await asyncio.gather(registration.set_models(["b"]), registration.set_models(["b", "c"]))
        await view.wait_for(lambda view: view.models_of("vae-1") == ("b", "c"))
        await registration.set_models([])
        await view.wait_for(lambda view: view.models_of("vae-1") == ())


async def test_a_model_that_cannot_be_a_key_is_refused_and_changes_nothing() -> None:
    registration = Registration(MemoryRegistry(), VAE)
    await registration.set_models(["sd"])
    with pytest.raises(ValueError, match="model_id"):
        await registration.set_models(["sd", "../members/vae/x"])
    assert registration._residences.keys() == {"sd"}


async def test_a_member_that_leaves_vanishes_at_once_and_stays_away(registry: Registry) -> None:
    view, registration = ClusterView(registry), Registration(registry, VAE)
    async with running(view.run()), running(registration.run()) as run:
        async with asyncio.timeout(5):
            await registration.set_models(["sd"])
            await view.wait_for(sees_vae)
        await registration.leave()
        await until(lambda: sees_nobody(view) and view.models_of("vae-1") == (), within_s=0.5)
        assert not registration.is_registered
        await until(run.done, within_s=2.5)
        await registration.set_models(["sd"])
        assert await registry.read(keys.ROOT) == {}


async def test_leaving_before_registering_is_no_error(registry: Registry) -> None:
    registration = Registration(registry, VAE)
    await registration.leave()
    await registration.run()
    assert await registry.read(keys.ROOT) == {}


async def test_a_registration_that_stops_running_ends_with_its_lease(registry: Registry) -> None:
    view, registration = ClusterView(registry), Registration(registry, VAE, ttl_s=1)
    async with running(view.run()):
        async with running(registration.run()):
            await until(lambda: sees_vae(view))
            await asyncio.sleep(1.6)
            assert sees_vae(view)
        await until(lambda: sees_nobody(view), within_s=4.0)
        assert not registration.is_registered


async def test_a_lease_revoked_behind_its_back_is_replaced(registry: Registry) -> None:
    view, registration = ClusterView(registry), Registration(registry, VAE)
    await registration.set_models(["sd"])
    async with running(view.run()), running(registration.run()):
        await until(lambda: sees_vae(view) and view.models_of("vae-1") == ("sd",))
        lease = registration._lease
        assert lease is not None
        await registry.revoke(lease)
        await until(lambda: sees_nobody(view) and view.models_of("vae-1") == ())
        assert await until(lambda: sees_vae(view) and view.models_of("vae-1") == ("sd",)) < 1.5
        assert registration.is_registered


async def test_what_was_said_while_the_registry_was_away_is_said_when_it_is_back() -> None:
    registry = MemoryRegistry()
    view, registration = ClusterView(registry), Registration(registry, VAE, ttl_s=1)
    await registration.set_models(["old"])
    async with running(view.run()), running(registration.run()):
        await until(lambda: sees_vae(view))
        registry.set_reachable(is_reachable=False)
        await registration.set_models(["new"])
        await until(lambda: not registration.is_registered)
        assert sees_vae(view)
        assert view.models_of("vae-1") == ("old",)
        registry.set_reachable(is_reachable=True)
        assert await until(lambda: sees_vae(view) and view.models_of("vae-1") == ("new",)) < 1


async def test_leaving_while_the_registry_is_away_is_left_to_the_lease() -> None:
    registry = MemoryRegistry()
    registration = Registration(registry, VAE, ttl_s=1)
    async with running(registration.run()):
        await until(lambda: registration.is_registered)
        registry.set_reachable(is_reachable=False)
        await registration.leave()
        registry.set_reachable(is_reachable=True)
        await asyncio.sleep(1.5)
    assert await registry.read(keys.ROOT) == {}


async def test_a_replica_registers_again_after_etcd_lost_its_data(etcd: EtcdProcess) -> None:
    registry = EtcdRegistry([etcd.endpoint])
    view, registration = ClusterView(registry), Registration(registry, VAE)
    await registration.set_models(["sd"])
    async with running(view.run()), running(registration.run()):
        await until(lambda: sees_vae(view) and view.models_of("vae-1") == ("sd",))
        etcd.stop()
        etcd.wipe()
        await asyncio.sleep(1.5)
        assert sees_vae(view)
        await asyncio.to_thread(etcd.start)
        assert (
            await until(lambda: len(json.loads(etcd.control("get", "/", "--prefix", "-w=json")).get("kvs", [])) == 2)
            < 2
        )
        await until(lambda: sees_vae(view) and view.models_of("vae-1") == ("sd",))
    await registry.close()


async def test_a_view_keeps_what_it_saw_while_etcd_is_down(etcd: EtcdProcess) -> None:
    registry = EtcdRegistry([etcd.endpoint])
    view, registration = ClusterView(registry), Registration(registry, VAE)
    await publish_catalogue(registry, [make_entry("sd")])
    async with running(view.run()) as following, running(registration.run()) as registering:
        await until(lambda: sees_vae(view) and view.is_ready)
        etcd.stop()
        await asyncio.sleep(2.0)
        await registration.set_models(["sd"])
        assert sees_vae(view)
        assert view.model("sd") == make_entry("sd")
        await asyncio.to_thread(etcd.start)
        assert await until(lambda: view.models_of("vae-1") == ("sd",)) < 2
        assert registration.is_registered
        assert not following.done()
        assert not registering.done()
    await registry.close()


async def test_a_replica_stays_registered_through_a_freeze(etcd: EtcdProcess) -> None:
    registry = EtcdRegistry([etcd.endpoint])
    view, registration = ClusterView(registry), Registration(registry, VAE)
    async with running(view.run()), running(registration.run()):
        await until(lambda: sees_vae(view))
        etcd.freeze()
        await asyncio.sleep(3.0)
        assert sees_vae(view)
        etcd.thaw()
        await asyncio.wait_for(registration.set_models(["sd"]), 3.5)
        assert await until(lambda: view.models_of("vae-1") == ("sd",)) < 2
        await until(lambda: sees_vae(view) and registration.is_registered)
    await registry.close()


async def test_leaving_a_frozen_etcd_takes_a_second_at_most(etcd: EtcdProcess) -> None:
    registry = EtcdRegistry([etcd.endpoint])
    registration = Registration(registry, VAE)
    async with running(registration.run()):
        await until(lambda: registration.is_registered)
        etcd.freeze()
        started_s = asyncio.get_running_loop().time()
        await registration.leave()
        assert asyncio.get_running_loop().time() - started_s < 1.3
        etcd.thaw()
    await registry.close()


async def test_an_entry_that_cannot_be_read_is_passed_over(
    registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    broken = {
        keys.member("vae", "not-json"): b"\xff",
        keys.member("vae", "deep"): b"[" * 100_000,
        keys.member("vae", "no-object"): b"[]",
        keys.member("vae", "no-address"): b"{}",
        keys.member("vae", "bad-address"): b'{"address": "a b:1"}',
        keys.member("vae", "no-device"): b'{"address": "a:1", "device": 7}',
        f"{keys.MEMBERS}too/many/parts": b"{}",
        f"{keys.RESIDENCY}too-few": b"",
        keys.model("not-json"): b"{",
        keys.model("another"): make_entry("sd").to_json(),
        keys.model("lora"): make_lora_entry("ink").to_json(),
        keys.model("no-entry"): b"[]",
    }
    for key, value in broken.items():
        await registry.put(key, value)
    view, registration = ClusterView(registry), Registration(registry, VAE)
    async with running(view.run()), running(registration.run()), asyncio.timeout(5):
        await view.wait_for(lambda view: view.is_ready and sees_vae(view))
        assert view.members() == (VAE,)
        assert view.models() == ()
        assert view.loras() == ()
        await registry.put(keys.member("vae", "not-json"), b'{"address": "a:1"}')
        await view.wait_for(lambda view: len(view.members()) == 2)
    assert len(caplog.records) == len(broken)


async def test_waiting_asks_at_once_and_after_each_change() -> None:
    registry = MemoryRegistry()
    view = ClusterView(registry)
    await asyncio.wait_for(view.wait_for(lambda _: True), 1)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(view.wait_for(sees_vae), 0.1)
