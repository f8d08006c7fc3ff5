"""Load to break a cluster under, and the history that says whether anybody was harmed.

As a fault test is valid: at least 20 requests in flight and 5 answers a second when it breaks, over all routers. Each
request has one end, its steps count up, and its picture is the one that was drawn before anything broke.
"""

import asyncio
import contextlib
import hashlib
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import grpc
import psutil

from darkroom.errors import DarkroomError
from darkroom.runtime.cluster import LocalCluster
from darkroom.v1 import router_pb2, router_pb2_grpc, stage_pb2
from darkroom.wire.status import from_rpc_error

IN_FLIGHT, LEAST_PER_S = 20, 5.0
_CALLERS = 24
_SEEDS = 3
_STEPS = 3
_TIMEOUT_S = 60.0
_MORE_OPEN = 8
"""Descriptors or threads, by which a process may have grown: a connection to who came since, a thread of a pool."""
Key = tuple[str, int]
"""What a picture depends on here: model and seed."""


@dataclass(slots=True)
class Entry:
    """What one request was told."""

    key: Key
    start_s: float
    end_s: float = 0.0
    steps: list[int] = field(default_factory=list)
    """As they were reported, of all attempts."""
    digests: list[str] = field(default_factory=list)
    """Of the picture in each result."""
    error: DarkroomError | None = None


async def ask(router: grpc.aio.Channel, model_id: str, seed: int) -> Entry:
    """Draws a picture; what happened is in the entry, failures too."""
    entry = Entry((model_id, seed), asyncio.get_running_loop().time())
    request = router_pb2.GenerateRequest(
        prompt="a ring", model_id=model_id, width_px=32, height_px=32, step_count=_STEPS, seed=seed,
        deterministic=True,
    )  # fmt: skip
    try:
        async for event in router_pb2_grpc.RouterServiceStub(router).Generate(request, timeout=_TIMEOUT_S):
            if event.HasField("node_started") and event.node_started.stage == stage_pb2.STAGE_DENOISER:
                entry.steps.append(0)
            elif event.HasField("node_progress"):
                entry.steps.append(event.node_progress.step)
            elif event.HasField("result"):
                entry.digests.append(hashlib.sha256(event.result.images[0].data).hexdigest())
    except grpc.aio.AioRpcError as error:
        entry.error = from_rpc_error(error, "router")
        if entry.error is None:
            raise
    entry.end_s = asyncio.get_running_loop().time()
    return entry


class Load:
    """Callers that draw one picture after the other, at every router, until the block ends."""

    def __init__(self, cluster: LocalCluster, model_ids: Sequence[str]) -> None:
        self._cluster = cluster
        self._open: dict[int, tuple[str, int, int]] = {}
        addresses = (cluster.addresses.router, *cluster.addresses.other_routers)
        self.routers = [grpc.aio.insecure_channel(address) for address in addresses]
        self._keys = [(model_id, seed) for seed in range(_SEEDS) for model_id in model_ids]
        self._before: dict[Key, str] = {}
        self._in_flight = 0
        self._start_s = 0.0
        self._is_over = False
        self._callers: list[asyncio.Task[None]] = []
        self.history: list[Entry] = []

    async def __aenter__(self) -> Self:
        """Once the load is what a valid test needs."""
        try:
            for model_id, seed in self._keys:
                entry = await ask(self.routers[0], model_id, seed)
                assert entry.digests, entry
                self._before[entry.key] = entry.digests[0]
            turns = itertools.cycle(self._keys)
            self._start_s = asyncio.get_running_loop().time()
            self._callers = [
                asyncio.create_task(self._call(self.routers[number % len(self.routers)], turns))
                for number in range(_CALLERS)
            ]
            await self.goes_on(2 * _CALLERS)
        except BaseException:
            await self._end()
            raise
        self._open = _open_things(self._cluster)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Waits for the last answers; judges the history unless the test has failed anyway."""
        outcomes = await self._end()
        if kind is None:
            assert outcomes == [None] * _CALLERS
            self._judge()
            for pid, (name, fd_count, thread_count) in _open_things(self._cluster).items():
                if pid in self._open:  # else it was started since
                    _, fds_before, threads_before = self._open[pid]
                    assert fd_count <= fds_before + _MORE_OPEN, name
                    assert thread_count <= threads_before + _MORE_OPEN, name

    async def _end(self) -> list[BaseException | None]:
        """Waits for the last answers. Returns what each caller ended with."""
        self._is_over = True
        outcomes = await asyncio.gather(*self._callers, return_exceptions=True)
        await asyncio.gather(*(router.close() for router in self.routers))
        return outcomes

    async def _call(self, router: grpc.aio.Channel, turns: "itertools.cycle[Key]") -> None:
        while not self._is_over:
            self._in_flight += 1
            try:
                self.history.append(await ask(router, *next(turns)))
            finally:
                self._in_flight -= 1

    async def goes_on(self, count: int, *, within_s: float = 30.0) -> None:
        """Waits for so many more answers, which shows that requests flow, and that all was enough of a load so far."""
        before = len(self.history)
        async with asyncio.timeout(within_s):
            while len(self.history) < before + count:
                await asyncio.sleep(0.02)
        assert self._in_flight >= IN_FLIGHT, "INVALID: too few in flight"
        passed_s = asyncio.get_running_loop().time() - self._start_s
        assert len(self.history) / passed_s >= LEAST_PER_S, "INVALID: too few a second"

    def longest_s(self, since_s: float) -> float:
        """The longest that anybody has waited whose request came since then."""
        return max(entry.end_s - entry.start_s for entry in self.history if entry.start_s >= since_s)

    def _judge(self) -> None:
        failures = Counter(repr(entry.error) for entry in self.history if entry.error)
        assert not failures
        for entry in self.history:
            assert len(entry.digests) == 1, entry
            attempts = _attempts(entry.steps)
            assert all(attempt == sorted(set(attempt)) for attempt in attempts), entry
            assert attempts[-1][-1] == _STEPS, entry
            assert entry.digests[0] == self._before[entry.key], entry


def _attempts(steps: Sequence[int]) -> list[list[int]]:
    """The steps of each time that the request was handed to a denoiser."""
    found: list[list[int]] = []
    for step in steps:
        if step == 0:
            found.append([])
        else:
            found[-1].append(step)
    return found


def _open_things(cluster: LocalCluster) -> dict[int, tuple[str, int, int]]:
    """By process of the cluster: its name, file descriptors and threads."""
    found = {}
    for child in cluster.children:
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.pid is not None:
                process = psutil.Process(child.pid)
                found[child.pid] = (child.name, process.num_fds(), process.num_threads())
    return found
