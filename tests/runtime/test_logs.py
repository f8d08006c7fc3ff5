"""What a real service process writes to its log: one JSON object per line, and never a prompt."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from darkroom.runtime.channels import Channels
from darkroom.runtime.logs import Lines
from darkroom.runtime.processes import free_port
from darkroom.v1 import encoder_pb2, encoder_pb2_grpc
from tests.runtime.serving import call_raw
from tests.store.disks import fill, needs_root, small_disk

MARKER = "xyzzymarker"
ENCODE = "/darkroom.v1.EncoderService/Encode"


@dataclass(frozen=True, slots=True)
class Encoder:
    """An encoder process without a registry: it serves, and goes on looking for one."""

    channel: grpc.aio.Channel
    log: Path


@asynccontextmanager
async def encoder_process(store: Path, log: Path) -> AsyncIterator[Encoder]:
    """Ends with SIGTERM, and is then expected to end well."""
    address, nobody = (f"127.0.0.1:{free_port()}" for _ in range(2))
    command = [sys.executable, "-m", "services.encoder", "--address", address, "--etcd", nobody, "--log-level", "debug"]
    channels = Channels()
    with log.open("wb") as file:
        process = await asyncio.create_subprocess_exec(
            *command, "--model-store", str(store), stdout=file, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
    try:
        channel = channels.to(address)
        await asyncio.wait_for(channel.channel_ready(), timeout=60.0)
        yield Encoder(channel, log)
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), timeout=20.0) == 0
    finally:
        await channels.close()
        if process.returncode is None:
            process.kill()
            await process.wait()


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "encoder.log"


async def test_no_prompt_is_ever_logged_and_every_line_is_json(tiny_store: Path, log: Path) -> None:
    bad = [
        encoder_pb2.EncodeRequest(model_id="tiny-sd", prompt=f"{MARKER}\0"),
        encoder_pb2.EncodeRequest(model_id="tiny-sd", prompt=MARKER * 4000),
        encoder_pb2.EncodeRequest(model_id="tiny-sd", prompt="x", negative_prompt=f"{MARKER}\0"),
        encoder_pb2.EncodeRequest(model_id="nowhere", prompt=MARKER),
    ]
    async with encoder_process(tiny_store, log) as encoder:
        stub = encoder_pb2_grpc.EncoderServiceStub(encoder.channel)
        good = encoder_pb2.EncodeRequest(
            model_id="tiny-sd", prompt=f"{MARKER}\r\n{{}}%s" * 100, negative_prompt=MARKER, guided=True
        )
        assert (await stub.Encode(good, timeout=60.0)).embeddings
        for request in bad:
            assert await call_raw(encoder.channel, ENCODE, request.SerializeToString())
        assert await call_raw(encoder.channel, ENCODE, MARKER.encode())
    written = log.read_text()
    assert MARKER not in written
    entries = [json.loads(line) for line in written.splitlines()]
    events = [entry["event"] for entry in entries]
    assert events.count("request_failed") == len(bad) + 1
    assert {"serving", "loaded", "draining", "stopped"} <= set(events)
    assert all(entry["service"] == "encoder" and entry["replica_id"] for entry in entries if "replica_id" in entry)


_LOGGING = """
import logging, sys, structlog
from darkroom.runtime.logs import configure_logs
configure_logs("test", "r")
log = structlog.get_logger()
for number in range(3):
    log.info("said", number=number)
    logging.getLogger("other").error("said too")
print("went on")
"""


def test_a_log_that_takes_nothing_stops_nothing() -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run([sys.executable, "-c", _LOGGING], stdout=subprocess.PIPE, stderr=full, check=False)
    assert (done.returncode, done.stdout) == (0, b"went on\n")


@needs_root
def test_lines_are_lost_while_the_disk_is_full_and_counted_when_it_is_not(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1 << 20):
        other = fill(tmp_path / "disk", but_bytes=4096)
        with (tmp_path / "disk" / "log").open("ab", buffering=0) as file:
            lines = Lines(file.fileno())
            for number in range(8):
                lines.write(json.dumps({"number": number, "text": "x" * 1000}) + "\n")
            other.unlink()
            lines.write(json.dumps({"number": 8}) + "\n")
            lines.write(json.dumps({"number": 9}) + "\n")
        written = (tmp_path / "disk" / "log").read_text().splitlines()
    torn = written.pop(3)
    assert torn.startswith('{"number": 3')
    assert [json.loads(line).get("number") for line in written] == [0, 1, 2, None, 8, 9]
    assert json.loads(written[3]) == {"event": "log_lines_dropped", "count": 5, "level": "error"}
