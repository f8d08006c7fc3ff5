"""Imports stages once, then forks each of them: `python -m darkroom.runtime.zygote MODULE…`, its owner at the pipes.

A line of JSON that comes in asks for a process; lines that go out say its pid, and later how it ended. What is forked
is a session of its own, gets SIGTERM when this process dies, and runs the module as `python -m` would.
"""

import ctypes
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from darkroom.runtime.processes import opened

_PR_SET_PDEATHSIG = 1
_SAID_BYTES = 1 << 16


def preload(modules: Sequence[str]) -> None:
    """Imports programs, so that running them finds all that they import themselves."""
    gc.disable()  # what imports make is no garbage; whoever is forked turns it on again
    for module in modules:
        program = f"{module}.__main__"
        importlib.import_module(program)
        del sys.modules[program]
    gc.freeze()  # looking through it would copy its pages into every process


class Forks:
    """Forks whatever is asked for at one pipe, and tells another what became of it."""

    def __init__(self, asked: int, told: int) -> None:
        """Both are file descriptors."""
        self._asked, self._told = asked, told
        self._selector = selectors.DefaultSelector()
        self._selector.register(asked, selectors.EVENT_READ)
        self._rest = b""

    def serve(self) -> dict[str, Any] | None:
        """Returns in each forked process with what it was asked to be; here with None, when nobody can ask any more."""
        self._tell({"ready": True})
        while True:
            for key, _ in self._selector.select():
                if key.fd != self._asked:
                    self._reap(key.fd, key.data)
                    continue
                said = os.read(self._asked, _SAID_BYTES)
                if not said:
                    return None
                *lines, self._rest = (self._rest + said).split(b"\n")
                for line in lines:
                    asked: dict[str, Any] = json.loads(line)
                    if self._fork(asked["number"]):
                        return asked

    def _fork(self, number: int) -> bool:
        """Whether this is the new process."""
        owner = os.getpid()
        try:
            pid = os.fork()
        except OSError as error:
            self._tell({"number": number, "problem": str(error)})
            return False
        if pid:
            self._selector.register(os.pidfd_open(pid), selectors.EVENT_READ, pid)
            self._tell({"number": number, "pid": pid})
            return False
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != owner:
            os._exit(0)
        os.setsid()
        for key in list(self._selector.get_map().values()):
            os.close(key.fd)
        self._selector.close()
        os.close(self._told)
        return True

    def _reap(self, pidfd: int, pid: int) -> None:
        self._selector.unregister(pidfd)
        os.close(pidfd)
        _, status = os.waitpid(pid, 0)
        self._tell({"ended": pid, "code": os.waitstatus_to_exitcode(status)})

    def _tell(self, what: dict[str, object]) -> None:
        os.write(self._told, json.dumps(what).encode() + b"\n")


def become(asked: dict[str, Any]) -> None:
    """Runs what this process was forked for, with output, environment and arguments of its own."""
    with Path(os.devnull).open("rb") as nothing, opened(Path(asked["log"])) as log:
        for source, target in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(source.fileno(), target)
    Path("/proc/self/comm").write_text(asked["name"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    sys.argv[1:] = asked["arguments"]
    runpy.run_module(asked["module"], run_name="__main__", alter_sys=True)


def main(modules: Sequence[str]) -> None:
    """Serves its owner until that closes the pipe."""
    asked, told = os.dup(0), os.dup(1)
    os.dup2(2, 1)  # what imports print is no answer
    preload(modules)
    forked = Forks(asked, told).serve()
    if forked:
        become(forked)


if __name__ == "__main__":
    main(sys.argv[1:])
