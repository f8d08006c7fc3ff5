"""Copies of models that other replicas of a stage have: one more is worth the less, the more there are."""

from collections import Counter

from darkroom.policy.worth import Tier
from darkroom.registry.membership import ClusterView
from darkroom.registry.port import Member


def copies_elsewhere(view: ClusterView, own: Member) -> dict[str, tuple[int, int, int]]:
    """By model, those on other replicas' devices, in their memory, and on other machines' disks."""
    counts: dict[Tier, Counter[str]] = {tier: Counter() for tier in (Tier.DEVICE, Tier.HOST, Tier.DISK)}
    disks: set[tuple[str, str]] = set()
    for member in view.members(own.stage):
        if member.replica_id == own.replica_id:
            continue
        for model_id, residence in view.residences_of(member.replica_id).items():
            counts[Tier.DEVICE][model_id] += residence.device_bytes is not None
            counts[Tier.HOST][model_id] += residence.host_bytes is not None
            if residence.disk_bytes is not None and member.machine != own.machine:
                disks.add((model_id, member.machine))
    counts[Tier.DISK].update(model_id for model_id, _ in disks)
    found = {model_id for of_tier in counts.values() for model_id in of_tier}
    return {
        model_id: (counts[Tier.DEVICE][model_id], counts[Tier.HOST][model_id], counts[Tier.DISK][model_id])
        for model_id in found
    }
