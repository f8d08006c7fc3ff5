"""Where one more copy of a model would be warm first, on a replica that is up or on one to be started. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from darkroom.policy.worth import LoadTimes, Tier

_NONE: Mapping[str, Tier] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """A replica, the machine it runs on, and the nearest tier on which it has the model."""

    replica_id: str
    machine: str
    tier: Tier


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """Where a copy could be."""

    machine: str
    replica_id: str | None
    """None means a replica to be started there."""
    warm_s: float
    """Until it could take a request for the model without a load."""
    reason: str


def sites(
    hosts: Sequence[Host],
    size_bytes: float,
    times: LoadTimes,
    start_s: float,
    *,
    spare: Mapping[str, Tier] = _NONE,
) -> list[Site]:
    """Every replica without the model on its device, and a new replica on every machine: the soonest warm first.

    `start_s`: until a new process serves. It shares its machine's disk, and nobody's memory. `spare`: machines that
    have no replica, and where the model is there.
    """
    found = [
        Site(
            machine=host.machine,
            replica_id=host.replica_id,
            warm_s=size_bytes * times.saved_s(host.tier, Tier.DEVICE),
            reason=f"up, and has it on {_named(host.tier)}",
        )
        for host in hosts
        if host.tier is not Tier.DEVICE
    ]
    for machine, tier in sorted({**spare, **_disks(hosts)}.items()):
        warm_s = start_s + size_bytes * times.saved_s(tier, Tier.DEVICE)
        found.append(Site(machine=machine, replica_id=None, warm_s=warm_s, reason=f"to be started; {_named(tier)}"))
    return sorted(found, key=lambda site: (site.warm_s, site.machine, site.replica_id or ""))


def _disks(hosts: Sequence[Host]) -> Mapping[str, Tier]:
    """Whether each machine's disk has the model: what is in a process's memory came by way of the disk."""
    tiers: dict[str, Tier] = {}
    for host in hosts:
        tiers[host.machine] = min(tiers.get(host.machine, Tier.REMOTE), max(host.tier, Tier.DISK))
    return tiers


def _named(tier: Tier) -> str:
    return {Tier.REMOTE: "no tier of the machine"}.get(tier, tier.name.lower())
