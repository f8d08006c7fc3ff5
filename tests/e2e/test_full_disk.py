"""A cluster whose disk is full, its store's cache and its logs on it: requests go on, cold models among them."""

import asyncio
import os
import shutil
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from darkroom.client import Client, Drawing
from darkroom.errors import StageUnavailable
from darkroom.runtime.cluster import ClusterConfig, LocalCluster
from darkroom.store.indexing import write_index
from tests.shipped import SHAPES
from tests.store.disks import fill, needs_root, small_disk
from tests.store.servers import Nginx, needs_nginx, nginx

pytestmark = [pytest.mark.long, needs_nginx, needs_root, pytest.mark.asyncio(loop_scope="module")]
_UNET = "unet/diffusion_pytorch_model.safetensors"
_WAIT_S = 60.0


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nginx]:
    """Copies of the shipped model with UNets of their own."""
    root = tmp_path_factory.mktemp("remote")
    for number, name in enumerate(("shapes", "second", "third")):
        shutil.copytree(SHAPES, root / name)
        content = bytearray((root / name / _UNET).read_bytes())
        content[-1] ^= number
        (root / name / _UNET).write_bytes(content)
    write_index(root)
    with nginx(root, tmp_path_factory.mktemp("nginx")) as server:
        yield server


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Room for a few models."""
    folder = tmp_path_factory.mktemp("disk")
    with small_disk(folder, 64 << 20):
        yield folder


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(web: Nginx, disk: Path) -> AsyncIterator[LocalCluster]:
    config = ClusterConfig(
        denoisers=1,
        model_store=web.url,
        store_cache=disk / "cache",
        log_folder=disk / "logs",
        device_budget_bytes=3 * (SHAPES / _UNET).stat().st_size,  # one UNet's, in single precision
    )
    async with LocalCluster(config) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def client(cluster: LocalCluster) -> AsyncIterator[Client]:
    async with Client(
        router_address=cluster.addresses.router, cachemgr_address=cluster.addresses.cachemgr
    ) as connected:
        yield connected


async def _draw(client: Client, model_id: str) -> bytes:
    drawing = Drawing(
        prompt="a large red circle in the center", model_id=model_id, seed=1, step_count=4, deterministic=True
    )
    return (await client.draw(drawing, timeout_s=_WAIT_S)).images[0]


async def test_cold_models_are_served_with_the_disk_full(client: Client, web: Nginx, disk: Path) -> None:
    other = fill(disk)
    first = await _draw(client, "shapes")
    assert await _draw(client, "second") != first
    assert not list(disk.glob("cache/stores/*/*/*/*.safetensors"))
    assert list((disk / "cache" / "partial").iterdir()) == []
    assert web.fetch_count(f"/shapes/{_UNET}") == 2  # its header, by which it is admitted, and all of it
    other.unlink()
    assert await _draw(client, "shapes") == first
    assert list(disk.glob(f"cache/stores/*/shapes/{_UNET}"))


async def test_it_is_said_to_be_in_memory_only(client: Client) -> None:
    async with asyncio.timeout(_WAIT_S):
        while True:
            said = [report for report in await client.replicas() if report.listed.replica_id.startswith("denoiser")]
            copies = {copy.model_id: copy for report in said for copy in report.listed.residences}
            if "second" in copies and copies["second"].HasField("host_bytes"):
                break
            await asyncio.sleep(0.2)
    assert not copies["second"].HasField("disk_bytes")
    assert copies["shapes"].HasField("disk_bytes")


async def test_a_service_that_dies_comes_back_though_nothing_can_be_logged(
    client: Client, cluster: LocalCluster, disk: Path
) -> None:
    fill(disk)
    assert not list(disk.glob(f"cache/stores/*/third/{_UNET}"))
    child = cluster.child("denoiser-1")
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    async with asyncio.timeout(_WAIT_S):
        while True:
            try:
                await _draw(client, "third")
                break
            except StageUnavailable:  # until its lease has ended, or another has taken its place
                await asyncio.sleep(0.5)
    assert child.start_count == 2
