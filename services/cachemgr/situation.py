"""The cluster as the plan sees it, read off what replicas, the catalogue and routers say."""

import math
from collections.abc import Mapping, Sequence

from darkroom.policy.planning import CacheReplica
from darkroom.policy.scaling import Host, Site, sites
from darkroom.policy.worth import LoadTimes, Tier
from darkroom.registry.announced import nearest_tier
from darkroom.registry.catalogue import ModelEntry
from darkroom.registry.membership import ClusterView
from darkroom.registry.parts import PART_STAGES, stage_bytes
from darkroom.registry.port import Member
from darkroom.registry.residence import Residence

START_S = 10.0
"""Until a stage process that is started serves: mostly Python and torch coming up."""
_NO_ROOM = (0.0, 0.0, 0.0)


def sizes_by_stage(models: Sequence[ModelEntry]) -> dict[str, dict[str, float]]:
    """Bytes by stage and model."""
    sizes: dict[str, dict[str, float]] = {stage: {} for stage in PART_STAGES}
    for entry in models:
        for stage, size in stage_bytes(entry).items():
            sizes[stage][entry.model_id] = size
    return sizes


def as_loaded(view: ClusterView, sizes: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """The same with what replicas say that models take on their devices: half precision on disk may be single there."""
    found = {stage: dict(of_stage) for stage, of_stage in sizes.items()}
    for member in view.members():
        for model_id, residence in view.residences_of(member.replica_id).items():
            if residence.device_bytes and model_id in found.get(member.stage, {}):
                found[member.stage][model_id] = max(found[member.stage][model_id], float(residence.device_bytes))
    return found


def replicas(
    view: ClusterView, sizes: Mapping[str, Mapping[str, float]], busy_ids: frozenset[str]
) -> list[CacheReplica]:
    """Every stage replica that holds models, by id."""
    found = []
    for member in view.members():
        if member.stage in sizes:
            known, residences = sizes[member.stage], view.residences_of(member.replica_id)
            found.append(
                CacheReplica(
                    replica_id=member.replica_id,
                    stage=member.stage,
                    is_idle=member.replica_id not in busy_ids,
                    rooms=_rooms(member),
                    held=_held(member, residences, known),
                    evicts=member.rooms is not None and member.rooms.evicts,
                    is_one_memory=member.is_one_memory,
                )
            )
    return sorted(found, key=lambda replica: replica.replica_id)


def _rooms(member: Member) -> tuple[float, float, float]:
    if member.rooms is None:
        return _NO_ROOM
    host = math.inf if member.is_one_memory else float(member.rooms.host_bytes)
    disk = math.inf if member.rooms.disk_bytes is None else float(member.rooms.disk_bytes)
    return float(member.rooms.device_bytes), host, disk


def _held(
    member: Member, residences: Mapping[str, Residence], known: Mapping[str, float]
) -> tuple[Mapping[str, float], Mapping[str, float], Mapping[str, float]]:
    """What each tier holds. Where host and device are one, host counts as disk does: nothing need move there."""
    device = {name: r.device_bytes or known[name] for name, r in residences.items() if _is(r.device_bytes, name, known)}
    disk: Mapping[str, float] = {name: known[name] for name, r in residences.items() if _is(r.disk_bytes, name, known)}
    if member.rooms is not None and member.rooms.disk_bytes is None:
        disk = known
    host = {name: known[name] for name, r in residences.items() if _is(r.host_bytes, name, known)}
    return device, disk if member.is_one_memory else host, disk


def _is(size_bytes: int | None, name: str, known: Mapping[str, float]) -> bool:
    return size_bytes is not None and name in known


def load_times(view: ClusterView, stage: str, guessed: LoadTimes) -> LoadTimes:
    """What loads of a stage took lately, per byte; as guessed where nobody has loaded anything."""
    loads = [
        (residence.load_s, residence.device_bytes)
        for member in view.members(stage)
        for residence in view.residences_of(member.replica_id).values()
        if residence.load_s and residence.device_bytes
    ]
    total_bytes = sum(size for _, size in loads)
    whole_s = sum(load_s for load_s, _ in loads) / total_bytes if loads else guessed.disk_s + guessed.bus_s
    if any(not member.is_one_memory for member in view.members(stage)):
        return LoadTimes(
            network_s=guessed.network_s, disk_s=max(whole_s - guessed.bus_s, guessed.bus_s), bus_s=guessed.bus_s
        )
    return LoadTimes(network_s=guessed.network_s, disk_s=0.0, bus_s=whole_s)


def best_sites(view: ClusterView, stage: str, model_id: str, size_bytes: float, times: LoadTimes) -> list[Site]:
    """Where one more copy would be warm first: on a replica that is up, and on one to be started.

    That may be on a machine that runs other stages only, on such a device. Its disk counts if the whole store lies
    there: of the files that it has fetched, nobody says whether they are those of this stage.
    """
    tiers = {
        member: nearest_tier(member, view.residences_of(member.replica_id).get(model_id))
        for member in view.members(stage)
    }
    hosts = [
        Host(replica_id=member.replica_id, machine=member.machine, tier=Tier.REMOTE if tier is None else tier)
        for member, tier in tiers.items()
    ]
    own, kinds = {member.machine for member in tiers}, {member.device.partition(":")[0] for member in tiers}
    spare = {
        member.machine: Tier.REMOTE if member.rooms.disk_bytes is not None else Tier.DISK
        for member in view.members()
        if member.rooms and member.machine not in own and member.device.partition(":")[0] in kinds
    }
    found = sites(hosts, size_bytes, times, START_S, spare=spare)
    up = [site for site in found if site.replica_id is not None]
    return [*up[:1], *[site for site in found if site.replica_id is None][:1]]
