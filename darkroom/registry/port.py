"""What the services ask of a registry. etcd and memory both answer it, so a service never knows which one it has."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import NewType, Protocol

LeaseId = NewType("LeaseId", int)
Revision = NewType("Revision", int)
"""Counts up with every change of the registry, so that no two keys created have the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rooms:
    """How much of models a stage replica can hold."""

    device_bytes: int
    """Of its device; 0 means that nothing should be brought there that no request asks for."""
    host_bytes: int
    """Of its memory, beside what is on the device."""
    disk_bytes: int | None
    """Of its machine's disk; None where the whole model store lies there."""
    evicts: bool
    """Whether models leave the device to make room for others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A service process that is up."""

    replica_id: str
    """New at each start, so that a restarted process is another replica."""
    stage: str
    """encoder, denoiser, vae, router or cachemgr."""
    address: str
    """host:port of its gRPC server, as others reach it."""
    device: str = ""
    """What it computes on, as torch names it; empty where that means nothing."""
    rooms: Rooms | None = None
    """None for what holds no models, or does not say."""

    @property
    def machine(self) -> str:
        """Its host: members of one share a disk."""
        return self.address.rpartition(":")[0]

    @property
    def is_one_memory(self) -> bool:
        """Whether its device's memory is the host's: there a model that leaves the device has left both."""
        return not self.device.startswith("cuda")


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """What a key holds after somebody claimed it: the claimant's own value, or that of whoever came first."""

    value: bytes
    created: Revision
    """When the key was created."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Guard:
    """A condition of a write: the key is there, and is the one that was created then."""

    key: str
    created: Revision


class Keys(Protocol):
    """Keys that can be read and written."""

    async def read(self, prefix: str) -> dict[str, bytes]:
        """Every key that starts with `prefix`."""

    async def put(self, key: str, value: bytes) -> None:
        """Writes the key."""

    async def delete(self, key: str) -> None:
        """Removes the key if it is there."""


class Registry(Protocol):
    """Keys and values, with leases and watches.

    Every method but `watch` and `close` raises RegistryUnavailable when there is no answer within the deadline.
    """

    async def read(self, prefix: str) -> dict[str, bytes]:
        """Every key that starts with `prefix`."""

    async def put(self, key: str, value: bytes, *, lease: LeaseId | None = None, guard: Guard | None = None) -> None:
        """Writes the key. It goes when `lease` ends, and raises RegistryUnavailable if that has ended already.

        Raises Deposed, and writes nothing, if `guard` does not hold.
        """

    async def delete(self, key: str, *, guard: Guard | None = None) -> None:
        """Removes the key if it is there. Raises Deposed, and removes nothing, if `guard` does not hold."""

    async def claim(self, key: str, value: bytes, *, lease: LeaseId) -> Claim:
        """Writes the key under the lease unless it is there; says what it holds now. May be repeated."""

    async def grant(self, ttl_s: int) -> LeaseId:
        """A new lease that ends `ttl_s` seconds after it was last kept alive."""

    async def keep_alive(self, lease: LeaseId) -> float:
        """Seconds the lease has from now on; 0 if it has ended, and then it never comes back."""

    async def revoke(self, lease: LeaseId) -> None:
        """Ends the lease now, with its keys. A lease that has ended already is no error."""

    def watch(self, prefix: str) -> AsyncIterator[dict[str, bytes]]:
        """Yields all that is under `prefix`: at once, then whenever it differs from what was last yielded.

        Never ends by itself. While the registry is away it waits; what it yields was true at some moment, in order.
        """

    async def close(self) -> None:
        """Lets go of the connection. Cancel what still watches first."""
