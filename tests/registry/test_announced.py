"""What placement is told of a replica, by what that announces."""

import asyncio
from collections.abc import Mapping
from dataclasses import replace

import pytest

from darkroom.policy.assignments import Announced, HeldModel
from darkroom.policy.worth import Tier
from darkroom.registry.announced import announced, nearest_tier
from darkroom.registry.membership import ClusterView, Registration
from darkroom.registry.memory import MemoryRegistry
from darkroom.registry.port import Member, Rooms
from darkroom.registry.residence import Residence
from tests.registry.following import running

STORE_HERE = Rooms(device_bytes=8, host_bytes=0, disk_bytes=None, evicts=True)
STORE_AFAR = Rooms(device_bytes=8, host_bytes=0, disk_bytes=9, evicts=False)


def member(replica_id: str, rooms: Rooms | None, device: str = "cuda:0", stage: str = "vae") -> Member:
    return Member(replica_id=replica_id, stage=stage, address="one:1", device=device, rooms=rooms)


@pytest.mark.parametrize(
    ("rooms", "residence", "tier"),
    [
        (STORE_AFAR, Residence(device_bytes=0, host_bytes=1, disk_bytes=1), Tier.DEVICE),
        (STORE_AFAR, Residence(host_bytes=1, disk_bytes=1), Tier.HOST),
        (STORE_AFAR, Residence(disk_bytes=1), Tier.DISK),
        (STORE_AFAR, None, Tier.REMOTE),
        (STORE_HERE, None, Tier.DISK),
        (None, Residence(device_bytes=0), Tier.DEVICE),
        (None, None, None),
    ],
)
def test_the_nearest_tier_counts(rooms: Rooms | None, residence: Residence | None, tier: Tier | None) -> None:
    assert nearest_tier(member("v1", rooms), residence) is tier


async def test_what_has_to_leave_a_bounded_device_is_told_with_its_copies_elsewhere() -> None:
    registry = MemoryRegistry()
    view = ClusterView(registry)
    both = Residence(device_bytes=5, host_bytes=4)
    bounded, on_cpu = member("v1", STORE_HERE), member("v2", STORE_HERE, "cpu")
    past_the_disk = member("v4", replace(STORE_AFAR, evicts=True))
    unbounded, other_stage = member("v3", STORE_AFAR), member("e1", STORE_HERE, stage="encoder")
    said: Mapping[Member, Mapping[str, Residence]] = {
        bounded: {"a": both, "b": Residence(device_bytes=2), "c": Residence(host_bytes=1)},
        on_cpu: {"a": both},
        unbounded: {"a": both},
        other_stage: {"b": both},
        past_the_disk: {"d": Residence(device_bytes=1), "e": Residence(device_bytes=1, disk_bytes=1)},
    }
    async with running(view.run()):
        for each, residences in said.items():
            registration = Registration(registry, each)
            await registration._register()
            await registration.set_residences(residences)
        async with asyncio.timeout(5):
            await view.wait_for(lambda view: all(view.residences_of(each.replica_id) for each in said))
        a = HeldModel(model_id="a", size_bytes=5.0, back=Tier.HOST, other_count=2)
        b = HeldModel(model_id="b", size_bytes=2.0, back=Tier.DISK, other_count=0)
        told = announced(view, bounded, "c")
        assert told == Announced(replica_id="v1", tier=Tier.HOST, room_bytes=8.0, held=(a, b))
        assert [model.back for model in announced(view, on_cpu, "c").held] == [Tier.DISK]
        assert [model.back for model in announced(view, past_the_disk, "c").held] == [Tier.REMOTE, Tier.DISK]
        assert announced(view, unbounded, "c") == Announced(replica_id="v3", tier=Tier.REMOTE)
        assert announced(view, bounded, "a") == Announced(replica_id="v1", tier=Tier.DEVICE)
