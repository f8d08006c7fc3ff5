"""Becomes another program, which gets SIGTERM when its parent dies: `python leash.py PARENT_PID PROGRAM ARGUMENT…`.

A program of its own, because the other way, code between fork and exec, runs in a copy of a process with threads: with
gRPC channels open there it crashes now and then. It is run by its path and imports nothing of the project.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(parent_pid: int, command: list[str]) -> None:
    """Does not return."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent_pid:
        sys.exit(0)  # the parent died before
    os.execvp(command[0], command)  # noqa: S606 - replacing itself is what it is for


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
