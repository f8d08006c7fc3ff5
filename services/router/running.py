"""Runs a graph: each node on the replica that placement picks, on another one when that fails, within the deadline."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, field

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
from darkroom.policy.worth import Tier
from darkroom.registry.membership import ClusterView
from darkroom.registry.port import Member
from darkroom.wire.graphs import Graph, Node
from services.router.attempts import Attempts
from services.router.calls import CallSettings, Stages
from services.router.placing import Placing
from services.router.preparing import Ahead
from services.router.values import Answer, Event, Finished, NodeProgress, NodeStarted, NodeTiming, Value

_MAX_RERUNS = 2
_PATIENCE_S = 5.0  # with a store: what failed sooner is tried on another replica of the same machine, too
_SILENCE_S = 3.0  # three times as long as a denoiser that lives stays silent
_CHECKPOINT_ERRORS = (InvalidCheckpoint, UnusableCheckpoint, DigestMismatch)
_log = structlog.get_logger()


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
        prepares_stages: bool = True,
        on_used: Callable[[Node, float], None] = lambda _node, _run_s: None,
    ) -> None:
        """`replica_wait_s`: how long to wait for a stage that has no replica; `max_running`: requests at once.

        `prepares_stages`: whether models are loaded at later stages while earlier ones run.
        `on_used` hears of each node that a stage has run, and how long that took there without a load.
        """
        self._on_used = on_used
        self._view, self._stages, self._placing = view, stages, Placing(view)
        self._replica_wait_s, self._max_running = replica_wait_s, max_running
        self._prepares_stages = prepares_stages
        self._request_count = 0

    @property
    def running(self) -> Mapping[str, int]:
        """Calls that run now, by replica."""
        return self._placing.assignments.running

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
        ahead = Ahead(self._placing, self._stages, node, run.settings)
        if node.sources and self._prepares_stages:
            ahead.begin()
        try:
            inputs = {port: await run.values[source] for port, source in node.sources.items()}
            ahead.come()
            run.values[node.node_id].set_result(await self._run_node(run, node, inputs))
        finally:
            ahead.end()

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
                if isinstance(error, StoreUnavailable) and loop.time() - attempts.begun_s > _PATIENCE_S:
                    attempts.tried += self._placing.fetching_beside(member, node)
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
            self._placing.suspect(member.replica_id)
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
        loop, assignments = asyncio.get_running_loop(), self._placing.assignments
        said, wanted = self._placing.said(member, node), self._placing.wanted(node)
        sent = assignments.send(said, wanted, loop.time())
        try:
            call = self._stages.call(member.address, node, inputs, run.settings, attempts)
            answer = await attempts.heed(
                call, node.stage, _SILENCE_S, lambda: bool(self._placing.untried(node.stage, [member.replica_id]))
            )
            assignments.answered(sent, loop.time())
            usual_s = assignments.run_s(wanted)
            self._on_used(node, answer.run_s if said.tier is Tier.DEVICE else min(answer.run_s, usual_s))
            return answer
        finally:
            assignments.close(sent)

    async def _place(self, node: Node, tried: list[str], failure: DarkroomError | None) -> Member:
        """The replica to call next. Waits while the stage has none; raises the last failure when all were tried."""
        untried = self._placing.untried(node.stage, tried)
        if not untried and isinstance(failure, Overloaded | StoreUnavailable):
            raise failure
        if not untried:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._replica_wait_s):
                    await self._view.wait_for(lambda _: bool(self._placing.untried(node.stage, tried)))
        chosen = self._placing.choose(node, tried)
        if chosen is None:
            raise failure or StageUnavailable(node.stage, "none is up")
        return chosen


def _is_input_lost(error: DarkroomError) -> bool:
    """Whether the stage is well, and the replica that holds its input is not."""
    return isinstance(error, TensorNotFound | UnknownHolder) or (
        isinstance(error, StageUnavailable) and error.facts["stage"] == "tensor"
    )


def _first(failures: BaseException) -> BaseException:
    while isinstance(failures, BaseExceptionGroup):
        failures = failures.exceptions[0]
    return failures
