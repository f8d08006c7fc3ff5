"""Real servers of a model store's files: nginx, and an S3 server."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
needs_nginx = pytest.mark.skipif(NGINX is None, reason="nginx is not installed")
_CONFIG = """
daemon off; master_process off; pid {folder}/pid; error_log {folder}/error.log; worker_processes 1;
events {{ worker_connections 64; }}
http {{
  access_log {folder}/access.log; {more}
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
    process: "subprocess.Popen[bytes]"

    def fetch_count(self, suffix: str) -> int:
        """How often files whose path ends so were asked for."""
        return sum(f"{suffix} HTTP" in line for line in self.access_log.read_text().splitlines())

    def stop(self) -> None:
        """The server is gone, its port closed."""
        self.process.terminate()
        self.process.wait()

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """The server hangs: it takes connections and answers nothing."""
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


@contextlib.contextmanager
def nginx(root: Path, folder: Path, *, inside: str = "", more: str = "") -> Iterator[Nginx]:
    """Nginx over the files at `root`; `inside` and `more` go into its configuration."""
    assert NGINX is not None
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    config = folder / "nginx.conf"
    config.write_text(_CONFIG.format(folder=folder, root=root, port=port, inside=inside, more=more))
    process = subprocess.Popen(
        [NGINX, "-c", str(config), "-p", str(folder), "-g", "user root;"]
        if os.getuid() == 0
        else [NGINX, "-c", str(config), "-p", str(folder)]
    )
    try:
        _wait_for(port)
        yield Nginx(f"http://127.0.0.1:{port}", folder / "access.log", process)
    finally:
        process.kill()
        process.wait()


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


def _wait_for(port: int) -> None:
    for _ in range(600):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.05)
    raise TimeoutError(port)
