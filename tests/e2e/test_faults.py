"""Processes die and stall: the running request is moved or fails clearly, and the cluster serves the next one."""

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from darkroom.client import Client, Drawing, Progress
from darkroom.errors import Unavailable
from darkroom.runtime.cluster import ClusterConfig, LocalCluster

pytestmark = pytest.mark.asyncio(loop_scope="module")
LONG = Drawing(
    prompt="a large red circle in the center on a white background", model_id="shapes", seed=1, step_count=150
)
SHORT = Drawing(prompt="a small blue star at the left on a black background", model_id="shapes", seed=2, step_count=4)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fragile(store: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalCluster]:
    """A cluster of its own, to break."""
    config = ClusterConfig(
        denoisers=2, model_store=store, preload=("shapes",), log_folder=tmp_path_factory.mktemp("logs")
    )
    async with LocalCluster(config) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def client(fragile: LocalCluster) -> AsyncIterator[Client]:
    async with Client(
        router_address=fragile.addresses.router, cachemgr_address=fragile.addresses.cachemgr
    ) as connected:
        yield connected


class Watcher:
    """Notes when a request has denoised a few steps, and each time it is handed to a denoiser."""

    def __init__(self) -> None:
        self.is_underway = asyncio.Event()
        self.handed_at_s: list[float] = []

    def __call__(self, progress: Progress) -> None:
        if progress.stage == "denoiser" and progress.step_count == 0:
            self.handed_at_s.append(asyncio.get_running_loop().time())
        if progress.step == 3:
            self.is_underway.set()


async def wait_until_drawn(client: Client, within_s: float) -> None:
    """Draws again and again until it works."""
    async with asyncio.timeout(within_s):
        while True:
            with contextlib.suppress(Unavailable):
                await client.draw(SHORT, timeout_s=within_s)
                return
            await asyncio.sleep(0.2)


@pytest.mark.parametrize("name", ["encoder-1", "denoiser-1", "denoiser-2", "vae-1", "router", "cachemgr", "etcd"])
async def test_kill_9_of_any_process_leaves_a_cluster_that_serves_the_next_request(
    fragile: LocalCluster, client: Client, name: str
) -> None:
    watcher = Watcher()
    running = asyncio.ensure_future(client.draw(LONG, timeout_s=60, on_progress=watcher))
    await asyncio.wait_for(watcher.is_underway.wait(), 60)
    pid = fragile.child(name).pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    if name == "router":
        with pytest.raises(Unavailable):
            await running
    else:
        assert (await running).images  # moved to another replica, waited for the restarted one, or was not concerned
    await wait_until_drawn(client, 60)
    assert fragile.child(name).start_count >= 2


async def test_a_stopped_denoiser_is_noticed_within_three_seconds(fragile: LocalCluster, client: Client) -> None:
    await wait_until_drawn(client, 60)
    async with asyncio.timeout(60):
        while sum(report.listed.replica_id.startswith("denoiser") for report in await client.replicas()) < 2:
            await asyncio.sleep(0.2)
    watcher = Watcher()
    running = asyncio.ensure_future(client.draw(LONG, timeout_s=60, on_progress=watcher))
    await asyncio.wait_for(watcher.is_underway.wait(), 30)
    stopped = await busy_denoiser(fragile, client)
    os.kill(stopped, signal.SIGSTOP)
    stopped_at_s = asyncio.get_running_loop().time()
    try:
        drawn = await running
    finally:
        os.kill(stopped, signal.SIGCONT)
    assert len(watcher.handed_at_s) == 2
    assert watcher.handed_at_s[1] - stopped_at_s <= 3.0
    assert next(stage for stage in drawn.stages if stage.stage == "denoiser").attempt_count == 2


async def busy_denoiser(cluster: LocalCluster, client: Client) -> int:
    """Process id of the denoiser that runs something."""
    busy = next(
        report.listed.address
        for report in await client.replicas()
        if report.state and report.state.stage == 2 and report.state.running_count
    )
    port = int(busy.rpartition(":")[2])
    for child in cluster.children:
        if child.name.startswith("denoiser") and f'"port": {port},' in child.log.read_text():
            assert child.pid is not None
            return child.pid
    raise AssertionError(busy)


async def test_nothing_is_left_behind(store: Path, tmp_path: Path) -> None:
    async with LocalCluster(ClusterConfig(denoisers=1, model_store=store, log_folder=tmp_path)) as cluster:
        pids = [child.pid for child in cluster.children]
    assert len(pids) == 6
    for pid in pids:
        assert pid is not None
        assert not Path(f"/proc/{pid}").exists()


async def test_sigterm_lets_running_requests_finish(fragile: LocalCluster, client: Client) -> None:
    await wait_until_drawn(client, 60)
    watcher = Watcher()
    running = asyncio.ensure_future(client.draw(LONG, timeout_s=60, on_progress=watcher))
    await asyncio.wait_for(watcher.is_underway.wait(), 30)
    os.kill(await busy_denoiser(fragile, client), signal.SIGTERM)
    drawn = await running
    assert next(stage for stage in drawn.stages if stage.stage == "denoiser").attempt_count == 1
