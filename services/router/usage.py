"""Tells every cache manager what requests used.

The rule: it costs requests nothing. What a manager does not take waits, merged and bounded, and is thrown away in the
end: popularity fades anyway.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import grpc
import structlog

from darkroom.errors import DarkroomError, StageUnavailable
from darkroom.registry.membership import ClusterView
from darkroom.runtime.channels import Channels
from darkroom.v1 import cachemgr_pb2_grpc
from darkroom.wire.graphs import DenoiseWork, Node
from darkroom.wire.status import from_rpc_error
from darkroom.wire.usage import MAX_RUN_S, MAX_USAGES, Usage, UsageReport, merged, report_message

_log = structlog.get_logger()
_INTERVAL_S = 1.0
_TIMEOUT_S = 2.0
_MAX_TRIES = 30
"""At one report; then it is thrown away."""


class Managers(Protocol):
    """How a cache manager is told."""

    async def report(self, address: str, report: UsageReport) -> None:
        """Hands a report over. Raises DarkroomError."""


@dataclass(slots=True)
class _Outbox:
    """What one manager has not taken yet."""

    waiting: tuple[Usage, ...] = ()
    sent: UsageReport | None = None
    """Repeated as it is until it is taken, for it may have been."""
    tries: int = 0
    was_busy: bool = False


class UsageReporter:
    """Collects usage and reports it."""

    def __init__(self, reporter_id: str, view: ClusterView, managers: Managers) -> None:
        self._reporter_id, self._view, self._managers = reporter_id, view, managers
        self._new: list[Usage] = []
        self._outboxes: dict[str, _Outbox] = {}
        self._sequence = 0

    def add(self, node: Node, run_s: float) -> None:
        """Notes a node that was run."""
        uses = node.work.loras if isinstance(node.work, DenoiseWork) else ()
        loras = tuple(Counter(use.lora_id for use in uses).items())
        run_s = min(max(run_s, 0.0), MAX_RUN_S)
        self._new.append(Usage(stage=node.stage, model_id=node.work.model_id, count=1, run_s=run_s, loras=loras))
        if len(self._new) > MAX_USAGES:
            self._new = list(merged(self._new))

    async def run(self, running: Callable[[], Mapping[str, int]]) -> None:
        """Reports until cancelled. `running`: calls that run now, by replica."""
        while True:
            await asyncio.sleep(_INTERVAL_S)
            await self.report(running())

    async def report(self, running: Mapping[str, int]) -> None:
        """Tells each manager that is up what it does not know yet."""
        new, self._new = merged(self._new), []
        addresses = {member.replica_id: member.address for member in self._view.members("cachemgr")}
        self._outboxes = {manager_id: self._outboxes.get(manager_id, _Outbox()) for manager_id in addresses}
        loads = tuple(sorted(running.items()))[:MAX_USAGES]
        for outbox in self._outboxes.values():
            outbox.waiting = merged((*outbox.waiting, *new))
        await asyncio.gather(
            *(self._send(addresses[manager_id], outbox, loads) for manager_id, outbox in self._outboxes.items())
        )

    async def _send(self, address: str, outbox: _Outbox, loads: tuple[tuple[str, int], ...]) -> None:
        if outbox.sent is None:
            if not (outbox.waiting or loads or outbox.was_busy):
                return
            self._sequence += 1
            outbox.sent, outbox.waiting, outbox.tries, outbox.was_busy = (
                UsageReport(reporter_id=self._reporter_id, sequence=self._sequence, usages=outbox.waiting, loads=loads),
                (),
                0,
                bool(loads),
            )
        outbox.tries += 1
        try:
            await self._managers.report(address, outbox.sent)
        except DarkroomError as error:
            if outbox.tries < _MAX_TRIES:
                return
            _log.warning("usage_not_reported", manager=address, reason=error.reason())
        outbox.sent = None


class GrpcManagers:
    """The cache managers, reached by address."""

    def __init__(self, channels: Channels) -> None:
        self._channels = channels

    async def report(self, address: str, report: UsageReport) -> None:
        """Hands a report over. Raises what the manager raised, or StageUnavailable for whatever else went wrong."""
        stub = cachemgr_pb2_grpc.CacheManagerServiceStub(self._channels.to(address))
        try:
            await stub.ReportUsage(report_message(report), timeout=_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            failure = from_rpc_error(error, "cachemgr")
            raise failure or StageUnavailable("cachemgr", error.code().name) from error
