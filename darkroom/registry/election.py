"""One leader among several candidates, and writes that only the leader of the running term can make.

The rule: a term is the revision at which the leader's key was created, so a later leader has a higher one, and the
registry itself refuses a write of a term that is over. That a candidate believes itself to lead is never enough: it may
have been stopped between looking and writing.
"""

import asyncio

import structlog

from darkroom.errors import RegistryUnavailable
from darkroom.registry.port import Guard, LeaseId, Registry, Revision

_log = structlog.get_logger()
_MAX_PAUSE_S = 1.0
_RETRY_S = 0.25
_RESIGN_DEADLINE_S = 1.0


class Fenced:
    """The registry as a leader uses it. Writes raise Deposed once the term is over."""

    def __init__(self, registry: Registry, guard: Guard) -> None:
        self._registry, self._guard = registry, guard

    @property
    def term(self) -> int:
        """The term of all that is written."""
        return self._guard.created

    async def read(self, prefix: str) -> dict[str, bytes]:
        """Every key that starts with `prefix`."""
        return await self._registry.read(prefix)

    async def put(self, key: str, value: bytes) -> None:
        """Writes the key, for longer than the term."""
        await self._registry.put(key, value, guard=self._guard)

    async def delete(self, key: str) -> None:
        """Removes the key if it is there."""
        await self._registry.delete(key, guard=self._guard)


class Election:
    """One candidate's part in the election for one key."""

    def __init__(self, registry: Registry, key: str, candidate_id: str, *, ttl_s: int = 5) -> None:
        """`candidate_id` is nobody else's, ever; `ttl_s`: how long a dead leader is still taken for one."""
        self._registry, self._key, self._id, self._ttl_s = registry, key, candidate_id, ttl_s
        self._lease: LeaseId | None = None
        self._lease_ends_s = 0.0
        self._created: Revision | None = None
        self._has_resigned = False
        self._changed = asyncio.Event()
        self._resigning = asyncio.Lock()
        self._elected = asyncio.Event()
        self.leader_id: str | None = None
        """Who leads, as last seen."""

    @property
    def leading(self) -> Fenced | None:
        """The registry for the leader's writes; None for others, and for a leader whose lease may have ended."""
        if self._created is None or self._has_resigned or asyncio.get_running_loop().time() >= self._lease_ends_s:
            return None
        return Fenced(self._registry, Guard(key=self._key, created=self._created))

    async def elected(self) -> Fenced:
        """What `leading` is, as soon as it is."""
        while (leading := self.leading) is None:
            self._elected.clear()
            await self._elected.wait()
        return leading

    async def run(self) -> None:
        """Stands for election until cancelled, or until `resign`."""
        async with asyncio.TaskGroup() as parts:
            watching = parts.create_task(self._watch())
            await self._stand()
            watching.cancel()

    async def resign(self) -> None:
        """Leaves the office, if held, at once and for good. If that takes over a second, the lease's end does it."""
        self._has_resigned = True
        try:
            async with asyncio.timeout(_RESIGN_DEADLINE_S), self._resigning:
                lease, self._lease = self._lease, None
                if lease is not None:
                    await self._registry.revoke(lease)
        except (RegistryUnavailable, TimeoutError) as error:
            _log.debug("resigns_when_its_lease_ends", problem=str(error))

    async def _watch(self) -> None:
        async for state in self._registry.watch(self._key):
            holder = state.get(self._key)
            self.leader_id = None if holder is None else holder.decode(errors="replace")
            self._changed.set()

    async def _stand(self) -> None:
        while not self._has_resigned:
            self._changed.clear()
            try:
                async with self._resigning:
                    await self._claim()
                pause_s = min(self._ttl_s / 3, _MAX_PAUSE_S)
            except RegistryUnavailable as error:
                _log.debug("election_waits_for_registry", problem=error.message)
                pause_s = _RETRY_S
            await self._pause(pause_s)

    async def _pause(self, pause_s: float) -> None:
        """Ends at once when the office falls vacant."""
        try:
            async with asyncio.timeout(pause_s):
                await self._changed.wait()
                while self.leader_id is not None:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            return

    async def _claim(self) -> None:
        if self._has_resigned:
            return
        lease = await self._living_lease()
        claim = await self._registry.claim(self._key, self._id.encode(), lease=lease)
        self.leader_id = claim.value.decode(errors="replace")
        self._hold(claim.created if self.leader_id == self._id else None)

    def _hold(self, created: Revision | None) -> None:
        """Takes the office of this term, or is out of office from now on."""
        if self._created not in {None, created}:
            _log.info("leads_no_longer", term=self._created)
        if created not in {None, self._created}:
            _log.info("leads", term=created)
        self._created = created
        if created is not None:
            self._elected.set()

    async def _living_lease(self) -> LeaseId:
        """The lease, kept alive; a new one where it has ended, and the office with it."""
        loop = asyncio.get_running_loop()
        asked_s = loop.time()
        left_s = await self._registry.keep_alive(self._lease) if self._lease is not None else 0.0
        if self._lease is None or left_s <= 0:
            self._hold(None)
            self._lease = await self._registry.grant(self._ttl_s)
            left_s = float(self._ttl_s)
        self._lease_ends_s = asked_s + left_s
        return self._lease
