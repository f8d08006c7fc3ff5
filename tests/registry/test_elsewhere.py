"""How many copies of a model others have, tier by tier."""

import asyncio

from darkroom.registry.elsewhere import copies_elsewhere
from darkroom.registry.membership import ClusterView, Registration
from darkroom.registry.memory import MemoryRegistry
from darkroom.registry.port import Member
from darkroom.registry.residence import Residence
from tests.registry.following import running


def member(replica_id: str, machine: str = "one", stage: str = "denoiser") -> Member:
    return Member(replica_id=replica_id, stage=stage, address=f"{machine}:1")


async def test_copies_of_others_are_counted_and_disks_by_machine() -> None:
    registry = MemoryRegistry()
    view = ClusterView(registry)
    device, disk = Residence(device_bytes=1, disk_bytes=1), Residence(disk_bytes=1)
    own = member("r1")
    said = {
        own: {"a": device},
        member("r2"): {"a": device, "b": disk},
        member("r3", "two"): {"a": Residence(device_bytes=1, host_bytes=1), "b": disk},
        member("r4", "two"): {"a": device, "b": disk},
        member("v1", "two", "vae"): {"a": device},
    }
    async with running(view.run()):
        for each, residences in said.items():
            registration = Registration(registry, each)
            await registration._register()
            await registration.set_residences(residences)
        async with asyncio.timeout(5):
            await view.wait_for(lambda view: all(view.residences_of(each.replica_id) for each in said))
        assert copies_elsewhere(view, own) == {"a": (3, 1, 1), "b": (0, 0, 1)}
