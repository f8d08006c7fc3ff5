"""The registry port in memory: for tests and for services that share one process. A real one, not a mock."""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

from darkroom.errors import Deposed, RegistryUnavailable
from darkroom.registry.port import Claim, Guard, LeaseId, Revision


@dataclass(slots=True, kw_only=True)
class _Lease:
    ttl_s: int
    timer: asyncio.TimerHandle
    keys: set[str] = field(default_factory=set)


class MemoryRegistry:
    """One registry that any number of services share. Leases end by the event loop's clock.

    Invariant: a key under a lease is in that lease's `keys` and in no other's.
    """

    def __init__(self) -> None:
        self._state: dict[str, bytes] = {}
        self._created: dict[str, Revision] = {}
        self._revision = 0
        self._leases: dict[LeaseId, _Lease] = {}
        self._granted_count = 0
        self._is_reachable = True
        self._changed = asyncio.Event()

    def set_reachable(self, *, is_reachable: bool) -> None:
        """Cuts everyone off, or lets them in again. Leases run on meanwhile, as they do in etcd."""
        self._is_reachable = is_reachable
        self._announce()

    async def read(self, prefix: str) -> dict[str, bytes]:
        """Every key that starts with `prefix`."""
        self._check("read")
        return self._under(prefix)

    async def put(self, key: str, value: bytes, *, lease: LeaseId | None = None, guard: Guard | None = None) -> None:
        """Writes the key, under this lease and no longer under another."""
        self._check("put", guard)
        if lease is not None and lease not in self._leases:
            raise RegistryUnavailable(f"put: lease {lease} has ended")
        self._detach(key)
        if lease is not None:
            self._leases[lease].keys.add(key)
        self._state[key] = value
        self._revision += 1
        self._created.setdefault(key, Revision(self._revision))
        self._announce()

    async def delete(self, key: str, *, guard: Guard | None = None) -> None:
        """Removes the key if it is there."""
        self._check("delete", guard)
        self._detach(key)
        self._remove(key)
        self._announce()

    async def claim(self, key: str, value: bytes, *, lease: LeaseId) -> Claim:
        """Writes the key unless it is there."""
        self._check("claim")
        if key not in self._state:
            await self.put(key, value, lease=lease)
        return Claim(value=self._state[key], created=self._created[key])

    async def grant(self, ttl_s: int) -> LeaseId:
        """A new lease."""
        self._check("grant")
        self._granted_count += 1
        lease = LeaseId(self._granted_count)
        self._leases[lease] = _Lease(ttl_s=ttl_s, timer=self._end_later(lease, ttl_s))
        return lease

    async def keep_alive(self, lease: LeaseId) -> float:
        """Seconds the lease has from now on; 0 if it has ended."""
        self._check("keep_alive")
        held = self._leases.get(lease)
        if held is None:
            return 0.0
        held.timer.cancel()
        held.timer = self._end_later(lease, held.ttl_s)
        return float(held.ttl_s)

    async def revoke(self, lease: LeaseId) -> None:
        """Ends the lease now, with its keys."""
        self._check("revoke")
        self._end(lease)

    async def watch(self, prefix: str) -> AsyncGenerator[dict[str, bytes], None]:
        """Yields all that is under `prefix`: at once, then whenever it differs."""
        shown: dict[str, bytes] | None = None
        while True:
            changed = self._changed
            state = self._under(prefix)
            if self._is_reachable and state != shown:
                shown = state
                yield dict(state)
            else:
                await changed.wait()

    async def close(self) -> None:
        """Nothing: the others who share it go on."""

    def _check(self, what: str, guard: Guard | None = None) -> None:
        if not self._is_reachable:
            raise RegistryUnavailable(f"{what}: cut off")
        if guard is not None and self._created.get(guard.key) != guard.created:
            raise Deposed(str(guard.created))

    def _remove(self, key: str) -> None:
        self._state.pop(key, None)
        self._created.pop(key, None)

    def _under(self, prefix: str) -> dict[str, bytes]:
        return {key: value for key, value in self._state.items() if key.startswith(prefix)}

    def _announce(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _detach(self, key: str) -> None:
        for lease in self._leases.values():
            lease.keys.discard(key)

    def _end_later(self, lease: LeaseId, ttl_s: int) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(ttl_s, self._end, lease)

    def _end(self, lease: LeaseId) -> None:
        held = self._leases.pop(lease, None)
        if held is None:
            return
        held.timer.cancel()
        for key in held.keys:
            self._remove(key)
        self._announce()
