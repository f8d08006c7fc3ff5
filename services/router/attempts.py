"""A node's attempts: what one leaves for the next, and how its silence is noticed."""

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeVar

from darkroom.errors import StageUnavailable
from services.router.values import CheckpointMessage, StepDone

T = TypeVar("T")
_LOOK_INTERVAL_S = 0.25


@dataclass(slots=True)
class Attempts:
    """The attempts at one node so far."""

    on_step: Callable[[StepDone], None]
    run_id: str = field(default_factory=lambda: secrets.token_hex(8))
    epoch: int = 0
    tried: list[str] = field(default_factory=list)
    """Replicas not to call again, latest last."""
    checkpoint: CheckpointMessage | None = None
    """Where the next attempt goes on from."""
    heard_s: float = field(default_factory=lambda: asyncio.get_running_loop().time())
    """When the running attempt was last heard of."""
    begun_s: float = 0.0
    """When the running attempt began."""
    is_streaming: bool = False
    """Whether the running attempt is one that says regularly that it lives."""
    _step: int = 0
    """The step that the checkpoint is of."""
    _progressed: bool = False

    def begin(self, replica_id: str) -> None:
        """Starts the next attempt, on this replica. After progress all others may be tried again."""
        self.tried = [*([] if self._progressed else self.tried), replica_id]
        self.epoch += 1
        self._progressed = self.is_streaming = False
        self.begun_s = self.heard_s = asyncio.get_running_loop().time()

    def hear(self) -> None:
        """The running attempt lives."""
        self.is_streaming = True
        self.heard_s = asyncio.get_running_loop().time()

    def step(self, done: StepDone, checkpoint: CheckpointMessage | None) -> None:
        """The running attempt has done a step. Only with a checkpoint further than the last is it progress."""
        if checkpoint is not None and done.step > self._step:
            self.checkpoint, self._step = checkpoint, done.step
            self.tried, self._progressed = self.tried[-1:], True
        self.on_step(done)

    def forget_checkpoint(self) -> None:
        """The next attempt starts from the beginning, on any replica."""
        self.checkpoint, self._step, self.tried = None, 0, []

    async def heed(self, call: Awaitable[T], stage: str, silence_s: float, is_other_up: Callable[[], bool]) -> T:
        """The call's answer. Raises StageUnavailable when it falls silent while there is another replica to go to.

        Only an attempt that was heard of once can fall silent.
        """
        work = asyncio.ensure_future(call)
        try:
            while not work.done():
                await asyncio.wait([work], timeout=_LOOK_INTERVAL_S)
                silent_s = asyncio.get_running_loop().time() - self.heard_s
                if not work.done() and self.is_streaming and silent_s > silence_s and is_other_up():
                    raise StageUnavailable(stage, f"its replica was silent for {silent_s:.1f} s")
            return work.result()
        finally:
            work.cancel()
