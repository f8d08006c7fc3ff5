"""A real etcd as a process, for tests: started, killed, frozen, and started again on the same port and data."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from darkroom.runtime.processes import free_port

_START_DEADLINE_S = 20.0


def find_program(name: str) -> str | None:
    """The path of `etcd` or `etcdctl`: from PATH, or beside this Python."""
    beside = Path(sys.executable).parent / name
    return shutil.which(name) or (str(beside) if beside.exists() else None)


class EtcdProcess:
    """One etcd on the loopback. Quick to elect, and without fsync: its data need only outlive the process."""

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir
        self.endpoint = f"127.0.0.1:{free_port()}"
        self._peer = f"http://127.0.0.1:{free_port()}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns when etcd serves. Raises RuntimeError if it does not."""
        program = find_program("etcd")
        if program is None:
            raise RuntimeError("no etcd on PATH")
        with self.data_dir.with_suffix(".log").open("ab") as log:
            self._process = subprocess.Popen([program, *self._arguments()], stdout=log, stderr=log)
        deadline_s = time.monotonic() + _START_DEADLINE_S
        while not self._is_healthy():
            if time.monotonic() > deadline_s or self._process.poll() is not None:
                raise RuntimeError(f"etcd did not start; see {log.name}")
            time.sleep(0.05)

    def stop(self) -> None:
        """Kills it, as a crash would. No error if it does not run."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def wipe(self) -> None:
        """Removes its data. Only while it is stopped."""
        shutil.rmtree(self.data_dir)

    def freeze(self) -> None:
        """Stops it where it is: connections stay open and nothing answers. Returns once it has stopped."""
        assert self._process is not None
        self._signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED)

    def thaw(self) -> None:
        """Lets it go on."""
        self._signal(signal.SIGCONT)

    def control(self, *arguments: str) -> str:
        """What etcdctl prints."""
        program = find_program("etcdctl")
        assert program is not None
        command = [program, "--endpoints", self.endpoint, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def _is_healthy(self) -> bool:
        """Whether it serves: asked over a bare socket, for etcdctl would take a second to say so."""
        host, _, port = self.endpoint.partition(":")
        try:
            with socket.create_connection((host, int(port)), timeout=1.0) as connection:
                connection.sendall(b"GET /health HTTP/1.0\r\n\r\n")
                return b'"true"' in b"".join(iter(lambda: connection.recv(4096), b""))
        except OSError:
            return False

    def _arguments(self) -> list[str]:
        client = f"http://{self.endpoint}"
        return [
            f"--data-dir={self.data_dir}",
            f"--listen-client-urls={client}",
            f"--advertise-client-urls={client}",
            f"--listen-peer-urls={self._peer}",
            f"--initial-advertise-peer-urls={self._peer}",
            f"--initial-cluster=default={self._peer}",
            "--heartbeat-interval=50",
            "--election-timeout=500",
            "--unsafe-no-fsync",
            "--logger=zap",
        ]
