"""The contract from outside Python: the Node.js client and the documented `buf curl` lines, against a real cluster."""

import asyncio
import base64
import io
import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from darkroom.runtime.cluster import LocalCluster

pytestmark = pytest.mark.asyncio(loop_scope="session")
ROOT = Path(__file__).parents[2]
NODE = ROOT / "examples" / "node"
BUF = ROOT / "node_modules" / ".bin" / "buf"


@dataclass(frozen=True, slots=True)
class Done:
    """A command that has ended."""

    code: int | None
    output: str
    errors: str


async def run(*command: str, folder: Path = ROOT) -> Done:
    """Runs a command to its end."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, cwd=folder, stdout=pipe, stderr=pipe)
    output, errors = await asyncio.wait_for(process.communicate(), 120)
    return Done(process.returncode, output.decode(), errors.decode())


def picture(file: Path) -> Image.Image:
    """The picture in a file, which is closed."""
    return Image.open(io.BytesIO(file.read_bytes()))


@pytest.fixture(scope="module")
def node_client() -> Path:
    """The client with its packages installed."""
    if not shutil.which("node") or not shutil.which("npm"):
        pytest.skip("Node.js is not installed")
    if not (NODE / "node_modules").is_dir():
        subprocess.run(["npm", "ci", "--no-audit", "--no-fund"], cwd=NODE, check=True, capture_output=True)
    return NODE / "draw.mjs"


async def test_the_node_client_draws_a_picture(cluster: LocalCluster, node_client: Path, tmp_path: Path) -> None:
    file = tmp_path / "circle.png"
    prompt = "a large red circle in the center"
    done = await run("node", str(node_client), prompt, "--out", str(file), "--router", cluster.addresses.router)
    assert done.code == 0, done.errors
    assert picture(file).size == (128, 128)


async def test_the_node_client_says_what_the_router_refused(
    cluster: LocalCluster, node_client: Path, tmp_path: Path
) -> None:
    unwritten = tmp_path / "x.png"
    done = await run("node", str(node_client), "  ", "--out", str(unwritten), "--router", cluster.addresses.router)
    assert done.code != 0
    assert "prompt" in done.errors
    assert "INVALID_FIELD" in done.errors
    assert not unwritten.exists()


def documented_lines() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "docs" / "grpc.md").read_text(), re.DOTALL)
    return [block.replace("buf curl", f"{BUF} curl") for block in blocks if block.startswith("buf curl")]


async def test_the_documented_buf_curl_lines_work(cluster: LocalCluster, tmp_path: Path) -> None:
    if not BUF.is_file():
        pytest.skip("buf is not installed; make check installs it")
    answers = []
    for line in documented_lines():
        command = line.replace("127.0.0.1:7600", cluster.addresses.router)
        command = command.replace("$CACHEMGR", cluster.addresses.cachemgr)
        answers.append(await run("sh", "-c", command, folder=tmp_path))
    drawn, as_file, *listed, refused = answers
    png = json.loads("[" + drawn.output.replace("}\n{", "},{") + "]")[-1]["result"]["images"][0]["data"]
    assert base64.b64decode(png).startswith(b"\x89PNG")
    assert as_file.code == 0, as_file.errors
    assert picture(tmp_path / "star.png").size == (128, 128)
    assert [answer.code for answer in listed] == [0] * len(listed)
    assert "shapes" in listed[0].output
    assert refused.code != 0
    assert "step_count" in refused.errors
