"""Has replicas load what a request's later nodes need while its earlier ones run.

The rule: a hint. It fails no request, none waits for it, and where everything is on the device none is sent.
"""

import asyncio
from collections.abc import Collection

import structlog

from darkroom.errors import DarkroomError, StoreUnavailable, Unavailable
from darkroom.policy.assignments import Prepared
from darkroom.registry.port import Member
from darkroom.wire.graphs import Node
from services.router.calls import CallSettings, Preparation, Stages
from services.router.placing import Placing

_log = structlog.get_logger()


class Ahead:
    """What is loaded for one node ahead of its turn. `end` it once the node is done."""

    def __init__(self, placing: Placing, stages: Stages, node: Node, settings: CallSettings) -> None:
        self._placing, self._stages, self._node, self._settings = placing, stages, node, settings
        self._prepared: Prepared | None = None
        self._has_come = False
        self._work: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Asks the replica that would get the node now, unless that has everything."""
        member = self._choose(())
        if member is not None:
            self._note(member)
            self._work = asyncio.create_task(self._ask(member))

    def come(self) -> None:
        """It is the node's turn: no other replica is asked. What is being loaded counts as before."""
        self._has_come = True
        if self._prepared is not None:
            self._placing.assignments.came(self._prepared)

    def end(self) -> None:
        """Asks nobody any more. A load that was begun goes on."""
        if self._work is not None:
            self._work.cancel()
        self._call_off()

    def _choose(self, tried: Collection[str]) -> Member | None:
        """The replica to ask; None where nothing has to be loaded."""
        cold = {m for m in self._placing.untried(self._node.stage, tried) if not self._placing.has_all(m, self._node)}
        if not cold:  # as of most requests: no forecast is needed
            return None
        member = self._placing.choose(self._node, tried, is_ahead=True)
        return member if member in cold else None

    def _note(self, member: Member) -> None:
        said, wanted = self._placing.said(member, self._node), self._placing.wanted(self._node)
        self._prepared = self._placing.assignments.prepare(said, wanted, asyncio.get_running_loop().time())

    def _call_off(self) -> None:
        if self._prepared is not None:
            self._placing.assignments.call_off(self._prepared)
            self._prepared = None

    async def _ask(self, member: Member) -> None:
        """Asks one replica, and others while they are gone."""
        tried = [member.replica_id]
        while not await self._is_settled(member):
            other = self._choose(tried)
            if other is None:
                return
            self._note(other)
            tried.append(other.replica_id)
            member = other

    async def _is_settled(self, member: Member) -> bool:
        """Asks a replica. Whether nobody else should be asked."""
        prepared = self._prepared
        assert prepared is not None
        try:
            done = await self._stages.prepare(member.address, self._node, self._settings)
        except DarkroomError as error:
            facts = {"request_id": self._settings.request_id, "stage": self._node.stage, "replica": member.replica_id}
            _log.info("not_prepared", **facts, reason=error.reason())
            self._call_off()
            is_gone = isinstance(error, Unavailable) and not isinstance(error, StoreUnavailable)
            if is_gone:
                self._placing.suspect(member.replica_id)
            return self._has_come or not is_gone
        if done is Preparation.LOADED:
            self._placing.assignments.loaded(prepared, asyncio.get_running_loop().time())
        if done is Preparation.UNHEARD:
            self._call_off()
        return True
