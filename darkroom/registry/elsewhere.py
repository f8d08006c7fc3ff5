"""Copies of models that other replicas of a stage have: one more is worth the less, the more there are."""

from collections import Counter

from darkroom.registry.membership import ClusterView
from darkroom.registry.port import Member


def copies_elsewhere(view: ClusterView, own: Member) -> dict[str, tuple[int, int, int]]:
    """By model, those on other replicas' devices, in their memory, and on other machines' disks."""
    others = [member for member in view.members(own.stage) if member.replica_id != own.replica_id]
    said = [(member, *item) for member in others for item in view.residences_of(member.replica_id).items()]
    devices = Counter(name for _, name, residence in said if residence.device_bytes is not None)
    memories = Counter(name for _, name, residence in said if residence.host_bytes is not None)
    on_disk = {
        (member.machine, name)
        for member, name, residence in said
        if residence.disk_bytes is not None and member.machine != own.machine
    }
    disks = Counter(name for _, name in on_disk)
    return {name: (devices[name], memories[name], disks[name]) for name in {name for _, name, _ in said}}
