"""Runs a graph: each node on the replica that placement picks, on another one when that fails, within the deadline."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import structlog

from darkroom.errors import (
    DarkroomError,
    DeadlinePassed,
    DigestMismatch,
    InvalidCheckpoint,
    Overloaded,
    QueueFull,
    StageUnavailable,
    StoreUnavailable,
    TensorNotFound,
    Unavailable,
    UnknownHolder,
    UnusableCheckpoint,
)
from darkroom.policy.assignments import Assignments
from darkroom.policy.forecast import Wanted
from darkroom.policy.placement import Candidate, choose_replica
from darkroom.policy.worth import Tier
from darkroom.registry.announced import announced
from darkroom.registry.membership import ClusterView
from darkroom.registry.parts import stage_bytes
from darkroom.registry.port import Member
from darkroom.wire.graphs import DenoiseWork, Graph, Node
from services.router.attempts import Attempts
from services.router.values import Answer, Event, Finished, NodeProgress, NodeStarted, NodeTiming, Value

_SUSPECT_S = 5.0  # as long as a dead replica's lease may live on
_MAX_RERUNS = 2
_SILENCE_S = 3.0  # three times as long as a denoiser that lives stays silent
_CHECKPOINT_ERRORS = (InvalidCheckpoint, UnusableCheckpoint, DigestMismatch)
_log = structlog.get_logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class CallSettings:
    """What every call of a request shares."""

    request_id: str
    deterministic: bool
    deadline_s: float
    """On the event loop's clock."""
    priority: int = 0
    tenant: str = ""

    def timeout_s(self) -> float:
        """Seconds left."""
        return max(0.0, self.deadline_s - asyncio.get_running_loop().time())


class Stages(Protocol):
    """How a replica is called."""

    async def call(
        self, address: str, node: Node, inputs: Mapping[str, Value], settings: CallSettings, attempts: Attempts
    ) -> Answer:
        """Runs the node's work at `address`, and tells `attempts` what it hears of it."""
        ...


@dataclass(slots=True)
class _Run:
    """One request's state."""

    graph: Graph
    settings: CallSettings
    events: asyncio.Queue[Event | None] = field(default_factory=asyncio.Queue)
    values: dict[str, "asyncio.Future[Value]"] = field(default_factory=dict)
    timings: list[NodeTiming] = field(default_factory=list)
    stage: str = "router"


class GraphRunner:
    """Runs graphs over the replicas in `view`."""

    def __init__(
        self,
        view: ClusterView,
        stages: Stages,
        *,
        replica_wait_s: float,
        max_running: int,
        on_used: Callable[[Node, float], None] = lambda _node, _run_s: None,
    ) -> None:
        """`replica_wait_s`: how long to wait for a stage that has no replica; `max_running`: requests at once.

        `on_used` hears of each node that a stage has run, and how long that took there without a load.
        """
        self._on_used = on_used
        self._view, self._stages = view, stages
        self._replica_wait_s, self._max_running = replica_wait_s, max_running
        self._assignments = Assignments()
        self._suspect_until_s: dict[str, float] = {}
        self._request_count = 0

    @property
    def running(self) -> Mapping[str, int]:
        """Calls that run now, by replica."""
        return self._assignments.running

    async def run(self, graph: Graph, settings: CallSettings) -> AsyncGenerator[Event, None]:
        """Events as they happen, `Finished` last. Closing the iterator cancels every call.

        Raises QueueFull, DeadlinePassed, Unavailable, or what a stage raised.
        """
        if self._request_count >= self._max_running:
            raise QueueFull(str(self._max_running), "1")
        self._request_count += 1
        run = _Run(graph, settings)
        work = asyncio.create_task(self._run_all(run))
        work.add_done_callback(lambda _: run.events.put_nowait(None))
        try:
            while (event := await run.events.get()) is not None:
                yield event
            yield await work
        finally:
            self._request_count -= 1
            work.cancel()
            with contextlib.suppress(asyncio.CancelledError, DarkroomError):
                await work

    async def _run_all(self, run: _Run) -> Finished:
        loop = asyncio.get_running_loop()
        start_s = loop.time()
        run.values = {node.node_id: loop.create_future() for node in run.graph.nodes}
        try:
            async with asyncio.timeout_at(run.settings.deadline_s):
                await self._run_nodes(run)
        except TimeoutError:
            raise DeadlinePassed(run.stage) from None
        values = {node_id: future.result() for node_id, future in run.values.items()}
        return Finished(values, tuple(run.timings), loop.time() - start_s)

    async def _run_nodes(self, run: _Run) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for node in run.graph.nodes:
                    group.create_task(self._run_node_when_ready(run, node))
        except BaseExceptionGroup as failures:
            raise _first(failures) from failures

    async def _run_node_when_ready(self, run: _Run, node: Node) -> None:
        inputs = {port: await run.values[source] for port, source in node.sources.items()}
        run.values[node.node_id].set_result(await self._run_node(run, node, inputs))

    async def _run_node(self, run: _Run, node: Node, inputs: Mapping[str, Value], reruns: int = 0) -> Value:
        """Tries replica after replica; when an input is lost with the replica that held it, makes it again first."""
        loop = asyncio.get_running_loop()
        start_s = loop.time()
        attempts = Attempts(lambda done: run.events.put_nowait(NodeProgress(node.node_id, done)))
        failure: DarkroomError | None = None
        while True:
            member = await self._place(node, attempts.tried, failure)
            attempts.begin(member.replica_id)
            run.stage = node.stage
            run.events.put_nowait(NodeStarted(node.node_id, node.stage, member.replica_id))
            try:
                answer = await self._call(run, node, inputs, member, attempts)
            except DarkroomError as error:
                if _is_input_lost(error) and reruns < _MAX_RERUNS:
                    return await self._run_node(run, node, await self._remake(run, node, reruns), reruns + 1)
                failure = self._after_failure(run, node, member, attempts, error)
                continue
            call_s = loop.time() - start_s
            run.timings.append(
                NodeTiming(node.node_id, node.stage, member.replica_id, call_s, answer.run_s, attempts.epoch)
            )
            return answer.value

    def _after_failure(
        self, run: _Run, node: Node, member: Member, attempts: Attempts, error: DarkroomError
    ) -> DarkroomError:
        """The error itself, if another attempt may succeed. Raises it if none can."""
        if attempts.checkpoint is not None and isinstance(error, _CHECKPOINT_ERRORS):
            attempts.forget_checkpoint()
        elif not isinstance(error, Unavailable | Overloaded):
            raise error
        _log.warning(
            "node_failed",
            request_id=run.settings.request_id,
            stage=node.stage,
            replica=member.replica_id,
            reason=error.reason(),
        )
        if isinstance(error, Unavailable) and not isinstance(error, StoreUnavailable):
            self._suspect(member.replica_id)
        return error

    async def _remake(self, run: _Run, node: Node, reruns: int) -> dict[str, Value]:
        nodes = {other.node_id: other for other in run.graph.nodes}
        made = {}
        for port, source in node.sources.items():
            inputs = {p: run.values[s].result() for p, s in nodes[source].sources.items()}
            made[port] = await self._run_node(run, nodes[source], inputs, reruns + 1)
        return made

    async def _call(
        self, run: _Run, node: Node, inputs: Mapping[str, Value], member: Member, attempts: Attempts
    ) -> Answer:
        loop, wanted = asyncio.get_running_loop(), self._wanted(node)
        said = announced(self._view, member, node.work.model_id)
        sent = self._assignments.send(said, wanted, loop.time())
        try:
            call = self._stages.call(member.address, node, inputs, run.settings, attempts)
            answer = await attempts.heed(
                call, node.stage, _SILENCE_S, lambda: bool(self._untried(node.stage, [member.replica_id]))
            )
            self._assignments.answered(sent, loop.time())
            usual_s = self._assignments.run_s(wanted)
            self._on_used(node, answer.run_s if said.tier is Tier.DEVICE else min(answer.run_s, usual_s))
            return answer
        finally:
            self._assignments.close(sent)

    async def _place(self, node: Node, tried: list[str], failure: DarkroomError | None) -> Member:
        """The replica to call next. Waits while the stage has none; raises the last failure when all were tried."""
        untried = self._untried(node.stage, tried)
        if not untried and isinstance(failure, Overloaded | StoreUnavailable):
            raise failure
        if not untried:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._replica_wait_s):
                    await self._view.wait_for(lambda _: bool(self._untried(node.stage, tried)))
        wanted = self._wanted(node)
        by_id = {member.replica_id: member for member in self._untried(node.stage, tried)}
        chosen = choose_replica([self._candidate(member, wanted) for member in by_id.values()])
        if chosen is None:
            raise failure or StageUnavailable(node.stage, "none is up")
        _log.debug("placed", stage=node.stage, replica=chosen.replica_id, why=chosen.reason)
        return by_id[chosen.replica_id]

    def _suspect(self, replica_id: str) -> None:
        now_s = asyncio.get_running_loop().time()
        self._suspect_until_s = {other: until_s for other, until_s in self._suspect_until_s.items() if until_s > now_s}
        self._suspect_until_s[replica_id] = now_s + _SUSPECT_S

    def _untried(self, stage: str, tried: list[str]) -> list[Member]:
        return [member for member in self._view.members(stage) if member.replica_id not in tried]

    def _candidate(self, member: Member, wanted: Wanted) -> Candidate:
        now_s = asyncio.get_running_loop().time()
        is_suspect = self._suspect_until_s.get(member.replica_id, 0.0) > now_s
        said = announced(self._view, member, wanted.model_id)
        return self._assignments.candidate(said, wanted, now_s, is_suspect=is_suspect)

    def _wanted(self, node: Node) -> Wanted:
        entry = self._view.model(node.work.model_id)
        size_bytes = stage_bytes(entry)[node.stage] if entry else 0.0
        return Wanted(stage=node.stage, model_id=node.work.model_id, work=work_of(node), size_bytes=size_bytes)


def work_of(node: Node) -> float:
    """How much work a node is: steps of megapixels for a denoiser, else 1."""
    match node.work:
        case DenoiseWork() as work:
            return work.step_count * work.image_count * work.width_px * work.height_px / 1e6
        case _:
            return 1.0


def _is_input_lost(error: DarkroomError) -> bool:
    """Whether the stage is well, and the replica that holds its input is not."""
    return isinstance(error, TensorNotFound | UnknownHolder) or (
        isinstance(error, StageUnavailable) and error.facts["stage"] == "tensor"
    )


def _first(failures: BaseException) -> BaseException:
    while isinstance(failures, BaseExceptionGroup):
        failures = failures.exceptions[0]
    return failures
