"""What a replica announces, as placement wants to know it."""

from collections import Counter

from darkroom.policy.assignments import Announced, HeldModel
from darkroom.policy.worth import Tier
from darkroom.registry.membership import ClusterView
from darkroom.registry.port import Member
from darkroom.registry.residence import Residence


def nearest_tier(member: Member, residence: Residence | None) -> Tier | None:
    """Where a replica has a model; None if it is on no tier of which the replica speaks."""
    if residence is not None and residence.device_bytes is not None:
        return Tier.DEVICE
    if residence is not None and residence.host_bytes is not None:
        return Tier.HOST
    if residence is not None and residence.disk_bytes is not None:
        return Tier.DISK
    if member.rooms is None:
        return None
    return Tier.DISK if member.rooms.disk_bytes is None else Tier.REMOTE


def announced(view: ClusterView, member: Member, model_id: str) -> Announced:
    """What a replica says that matters to requests for a model."""
    tier = nearest_tier(member, view.residences_of(member.replica_id).get(model_id))
    if tier is Tier.DEVICE or member.rooms is None or not member.rooms.evicts:
        return Announced(replica_id=member.replica_id, tier=tier)
    return Announced(
        replica_id=member.replica_id,
        tier=tier,
        room_bytes=float(member.rooms.device_bytes),
        held=_held(view, member),
    )


def _tier_behind(member: Member, residence: Residence) -> Tier:
    """Where what leaves its device comes back from."""
    if residence.host_bytes is not None:
        return Tier.DISK if member.is_one_memory else Tier.HOST
    is_here = member.rooms is None or member.rooms.disk_bytes is None or residence.disk_bytes is not None
    return Tier.DISK if is_here else Tier.REMOTE


def _held(view: ClusterView, member: Member) -> tuple[HeldModel, ...]:
    """The models on a replica's device."""
    counts: Counter[str] = Counter()
    for other in view.members(member.stage):
        counts.update(view.models_of(other.replica_id))
    return tuple(
        HeldModel(
            model_id=model_id,
            size_bytes=float(residence.device_bytes),
            back=_tier_behind(member, residence),
            other_count=counts[model_id] - 1,
        )
        for model_id, residence in view.residences_of(member.replica_id).items()
        if residence.device_bytes is not None
    )
