"""Loads for requests that are still at an earlier stage, because a router said that they will come.

The rule: a hint costs requests nothing that is theirs. It takes no place in the queue, and of the device what is idle,
as its request would a moment later; the load that it begins is the one that its request joins.
"""

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from darkroom.errors import Draining, InvalidField, QueueFull
from darkroom.models.controlnets import ControlNets
from darkroom.models.networks import Held
from darkroom.models.replica import StageReplica
from darkroom.wire.tasks import PrepareTask

_log = structlog.get_logger()
_MAX_LOADS = 16
"""Of hints at once: loads have threads for twice as many, so that those of requests find one."""
_RETRY_AFTER_S = "1"


class Preparations:
    """The hints of one replica. Its methods are called on one event loop."""

    def __init__(
        self,
        replica: StageReplica,
        held: Callable[[str], Awaitable[Held]],
        controlnets: ControlNets | None = None,
    ) -> None:
        """`held` gets what requests are for, by model id; `controlnets` None means that the stage takes none.

        Made inside an event loop.
        """
        self._replica, self._held, self._controlnets = replica, held, controlnets
        self._loading: dict[PrepareTask, asyncio.Task[None]] = {}
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def prepare(self, task: PrepareTask) -> bool:
        """Returns once all is here: whether the model's part was before, or on its way. Goes on when its caller leaves.

        Raises InvalidField, QueueFull, ModelNotFound, UnusableModel, StoreUnavailable, DeviceFull without a wait, or
        Draining if nobody is to wait any more.
        """
        if task.controlnet_ids and self._controlnets is None:
            raise InvalidField("controlnet_ids", f"must be empty: stage {self._replica.stage} takes no ControlNets")
        found = task in self._loading or task.model_id in self._replica
        if task not in self._loading:
            self._begin(task)
        load = self._loading[task]
        await asyncio.wait((load, self._ended), return_when=asyncio.FIRST_COMPLETED)
        if not load.done():
            raise Draining(self._replica.replica_id)
        load.result()
        return found

    async def end(self) -> None:
        """Has nobody wait any more: the replica goes down, and a load from afar would keep it up for no request."""
        if not self._ended.done():
            self._ended.set_result(None)

    def _begin(self, task: PrepareTask) -> None:
        if len(self._loading) >= _MAX_LOADS:
            raise QueueFull(str(_MAX_LOADS), _RETRY_AFTER_S)
        work = self._loading[task] = asyncio.create_task(self._load(task))
        work.add_done_callback(lambda work: work.cancelled() or work.exception())  # all callers may have left

    async def _load(self, task: PrepareTask) -> None:
        _log.info("preparing", request_id=task.request_id, model_id=task.model_id)
        try:
            with self._replica.preparing():
                self._replica.prefetch(task.model_id, task.loras)
                beside = [self._controlnets.get(each) for each in task.controlnet_ids] if self._controlnets else []
                await asyncio.gather(self._held(task.model_id), *beside)
        finally:
            del self._loading[task]
