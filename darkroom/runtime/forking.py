"""The owner's side of a zygote: processes that start without importing anything."""

import asyncio
import contextlib
import itertools
import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from darkroom.runtime.processes import ChildFailed, execute, tail


class ForkedProcess:
    """A process that the zygote is the parent of."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._has_ended = asyncio.Event()

    async def wait(self) -> int:
        """Until it ends; returns how."""
        await self._has_ended.wait()
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int, /) -> None:
        """Does nothing once it has ended."""
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):  # nobody has said so yet
                os.kill(self.pid, number)

    def terminate(self) -> None:
        """Sends SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Sends SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def ended(self, code: int) -> None:
        """Notes how it ended."""
        self.returncode = code
        self._has_ended.set()


class Zygote:
    """Starts with the first process that is asked for, and again with the next one should it die.

    Invariant: whatever it forked ends with it; it is killed where that has to be seen to here.
    """

    def __init__(self, modules: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        """`modules`: the programs that it will be asked to run. `environment`: what they get beside this process's."""
        self._modules, self._log, self._environment = modules, log, environment
        self._process: asyncio.subprocess.Process | None = None
        self._listener: asyncio.Task[None] | None = None
        self._starting = asyncio.Lock()
        self._is_ready = asyncio.Event()
        self._numbers = itertools.count()
        self._orders: dict[int, asyncio.Future[ForkedProcess]] = {}
        self._forked: dict[int, ForkedProcess] = {}

    async def fork(self, name: str, module: str, arguments: Sequence[str], log: Path) -> ForkedProcess:
        """A new process that runs `python -m module arguments…`. Raises ChildFailed if there can be none."""
        async with self._starting:
            if self._listener is None or self._listener.done():
                await self._start()
        number = next(self._numbers)
        order = {
            "number": number,
            "name": name,
            "module": module,
            "arguments": arguments,
            "environment": {**os.environ, **self._environment},
            "log": str(log),
        }
        forked: asyncio.Future[ForkedProcess] = asyncio.get_running_loop().create_future()
        self._orders[number] = forked
        try:
            assert self._process
            assert self._process.stdin
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            return await forked
        finally:
            del self._orders[number]

    async def stop(self) -> None:
        """Ends it and whatever it forked."""
        if self._process and self._process.returncode is None:
            self._process.terminate()
            await self._process.wait()
        if self._listener:
            await self._listener

    async def _start(self) -> None:
        command = [sys.executable, "-m", "darkroom.runtime.zygote", *self._modules]
        self._is_ready.clear()
        self._process = await execute(command, self._log, self._environment, is_piped=True)
        self._listener = asyncio.create_task(self._listen(self._process))
        ready = asyncio.create_task(self._is_ready.wait())
        try:
            await asyncio.wait((ready, self._listener), return_when=asyncio.FIRST_COMPLETED)
        finally:
            ready.cancel()
        if self._listener.done():
            raise self._failure()

    def _failure(self) -> ChildFailed:
        return ChildFailed(f"what forks others has ended; its log says:\n{tail(self._log)}")

    async def _listen(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout
        async for line in process.stdout:
            self._hear(json.loads(line))
        for forked in self._forked.values():
            forked.kill()
            forked.ended(-signal.SIGKILL)
        self._forked.clear()
        for order in self._orders.values():
            if not order.done():
                order.set_exception(self._failure())

    def _hear(self, said: dict[str, Any]) -> None:
        if "ready" in said:
            self._is_ready.set()
        elif "ended" in said:
            self._forked.pop(said["ended"]).ended(said["code"])
        else:
            order = self._orders.get(said["number"])
            is_wanted = order is not None and not order.done()
            if "pid" in said:
                forked = self._forked[said["pid"]] = ForkedProcess(said["pid"])
                if order is not None and is_wanted:
                    order.set_result(forked)
                else:  # who asked for it has left
                    forked.kill()
            elif order is not None and is_wanted:
                order.set_exception(ChildFailed(f"no process can be started: {said['problem']}"))
