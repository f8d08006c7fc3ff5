"""Real servers of a model store's files: nginx, and an S3 server."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from darkroom.runtime.processes import free_port

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
needs_nginx = pytest.mark.skipif(NGINX is None, reason="nginx is not installed")
_CONFIG = """
daemon off; master_process off; pid {folder}/pid; error_log {folder}/error.log; worker_processes 1;
events {{ worker_connections 64; }}
http {{
  log_format darkroom '"$request" $status $http_range';
  access_log {folder}/access.log darkroom; {more}
  client_body_temp_path {folder}; proxy_temp_path {folder}; fastcgi_temp_path {folder};
  uwsgi_temp_path {folder}; scgi_temp_path {folder};
  server {{ listen 127.0.0.1:{port}; root {root}; {inside} }}
}}
"""


@dataclass(slots=True)
class Nginx:
    """A running nginx."""

    url: str
    access_log: Path
    command: list[str]
    process: "subprocess.Popen[bytes]"

    @property
    def port(self) -> int:
        """The one it listens on."""
        return int(self.url.rpartition(":")[2])

    def fetch_count(self, suffix: str) -> int:
        """How often files whose path ends so were asked for."""
        return sum(f"{suffix} HTTP" in line for line in self.access_log.read_text().splitlines())

    def starts(self, suffix: str) -> list[int]:
        """From which byte on they were asked for, each time."""
        asked = [
            line.rpartition(" ")[2] for line in self.access_log.read_text().splitlines() if f"{suffix} HTTP" in line
        ]
        return [0 if text == "-" else int(text.removeprefix("bytes=").partition("-")[0]) for text in asked]

    def stop(self) -> None:
        """The server is gone, its port closed."""
        self.process.terminate()
        self.process.wait()

    @contextlib.contextmanager
    def down(self) -> Iterator[None]:
        """The server is gone inside, and started again after."""
        self.stop()
        try:
            yield
        finally:
            self.process = subprocess.Popen(self.command)
            _wait_for(self.port)

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """The server hangs: it takes connections and answers nothing."""
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)


@contextlib.contextmanager
def nginx(root: Path, folder: Path, *, inside: str = "", more: str = "", port: int | None = None) -> Iterator[Nginx]:
    """Nginx over the files at `root`; `inside` and `more` go into its configuration."""
    assert NGINX is not None
    folder.mkdir(parents=True, exist_ok=True)
    port = port or free_port()
    config = folder / "nginx.conf"
    config.write_text(_CONFIG.format(folder=folder, root=root, port=port, inside=inside, more=more))
    command = [NGINX, "-c", str(config), "-p", str(folder), *(["-g", "user root;"] if os.getuid() == 0 else [])]
    server = Nginx(f"http://127.0.0.1:{port}", folder / "access.log", command, subprocess.Popen(command))
    try:
        _wait_for(port)
        yield server
    finally:
        server.process.kill()
        server.process.wait()


class Cutting:
    """A TCP proxy that cuts each connection after so many bytes of what the server sends."""

    def __init__(self, port: int, cut_bytes: int | None = None) -> None:
        """In front of 127.0.0.1:`port`; None cuts nothing."""
        self._port, self._cut_bytes = port, cut_bytes
        self.sent_bytes = 0
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listening.getsockname()[1])
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        """Takes no more connections."""
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                threading.Thread(target=self._pass_on, args=(client,), daemon=True).start()

    def _pass_on(self, client: socket.socket) -> None:
        left = self._cut_bytes
        with client, socket.create_connection(("127.0.0.1", self._port)) as server:
            asking = threading.Thread(target=_copy, args=(client, server), daemon=True)
            asking.start()
            with contextlib.suppress(OSError):
                while (left is None or left > 0) and (part := server.recv(min(left or 65536, 65536))):
                    client.sendall(part)
                    self.sent_bytes += len(part)
                    left = None if left is None else left - len(part)
            for end in (client, server):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
            asking.join()


def _copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while part := source.recv(65536):
            target.sendall(part)


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """An S3 server's address."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait_for(port)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def fill_bucket(address: str, files: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A store's files in the bucket `models`, in the folder `store`; this process finds it. Returns a client."""
    import boto3  # noqa: PLC0415 - takes a second

    for name, value in {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL_S3": address,
    }.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3", endpoint_url=address)
    client.create_bucket(Bucket="models")
    for path in files.rglob("*"):
        if path.is_file():
            client.upload_file(str(path), "models", f"store/{path.relative_to(files)}")
    return client


def _wait_for(port: int) -> None:
    for _ in range(600):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.05)
    raise TimeoutError(port)
