"""One more copy goes where it is warm first."""

from darkroom.policy.scaling import Host, sites
from darkroom.policy.worth import LoadTimes, Tier

TIMES = LoadTimes(network_s=10e-9, disk_s=2e-9, bus_s=1e-9)
SIZE = 1e9


def host(replica_id: str, tier: Tier, machine: str = "a") -> Host:
    return Host(replica_id=replica_id, machine=machine, tier=tier)


def test_the_nearer_a_replica_has_it_the_sooner_it_is_warm() -> None:
    hosts = [
        host("r1", Tier.REMOTE, "b"),
        host("r2", Tier.DISK),
        host("r3", Tier.HOST),
        host("r4", Tier.DEVICE),
    ]
    found = sites(hosts, SIZE, TIMES, start_s=10.0)
    assert [(site.replica_id, round(site.warm_s, 6)) for site in found] == [
        ("r3", 1.0), ("r2", 3.0), ("r1", 11.0), (None, 13.0), (None, 21.0),
    ]  # fmt: skip
    assert [site.machine for site in found[-2:]] == ["a", "b"]
    assert "host" in found[0].reason


def test_a_new_replica_shares_its_machines_disk_and_nobodys_memory() -> None:
    (site,) = sites([host("r1", Tier.DEVICE), host("r2", Tier.DEVICE)], SIZE, TIMES, start_s=10.0)
    assert (site.replica_id, site.warm_s) == (None, 13.0)
    assert sites([], SIZE, TIMES, start_s=10.0) == []
