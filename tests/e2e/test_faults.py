"""Processes die and stall: the running request is moved or fails clearly, and the cluster serves the next one."""

import asyncio
import contextlib
import os
import random
import signal
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
import pytest_asyncio

from darkroom.client import Client, Drawing, Progress
from darkroom.errors import Unavailable
from darkroom.runtime.cluster import ClusterConfig, LocalCluster
from darkroom.v1 import denoiser_pb2, denoiser_pb2_grpc, stage_pb2, tensor_pb2

pytestmark = pytest.mark.asyncio(loop_scope="module")
DENOISER = stage_pb2.STAGE_DENOISER
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
        self.steps: list[int] = []

    def __call__(self, progress: Progress) -> None:
        if progress.stage == "denoiser" and progress.step_count == 0:
            self.handed_at_s.append(asyncio.get_running_loop().time())
        if progress.step:
            self.steps.append(progress.step)
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


async def wait_until_both_denoisers_are_up(client: Client) -> None:
    """And the cluster draws."""
    await wait_until_drawn(client, 60)
    async with asyncio.timeout(60):
        while sum(bool(report.state and report.state.stage == DENOISER) for report in await client.replicas()) < 2:
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
    await wait_until_both_denoisers_are_up(client)
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
        if report.state and report.state.stage == DENOISER and report.state.running_count
    )
    return pid_of(cluster, busy)


def pid_of(cluster: LocalCluster, address: str) -> int:
    """Process id of the denoiser at this address."""
    port = int(address.rpartition(":")[2])
    for child in cluster.children:
        if child.name.startswith("denoiser") and f'"port": {port},' in child.log.read_text():
            assert child.pid is not None
            return child.pid
    raise AssertionError(address)


async def test_nothing_is_left_behind(store: Path, tmp_path: Path) -> None:
    async with LocalCluster(ClusterConfig(denoisers=1, model_store=store, log_folder=tmp_path)) as cluster:
        pids = [child.pid for child in cluster.children]
    assert len(pids) == 6
    for pid in pids:
        assert pid is not None
        assert not Path(f"/proc/{pid}").exists()


async def test_sigterm_moves_running_requests_on_without_repeating_a_step(
    fragile: LocalCluster, client: Client
) -> None:
    await wait_until_both_denoisers_are_up(client)
    watcher = Watcher()
    running = asyncio.ensure_future(client.draw(LONG, timeout_s=60, on_progress=watcher))
    await asyncio.wait_for(watcher.is_underway.wait(), 30)
    os.kill(await busy_denoiser(fragile, client), signal.SIGTERM)
    drawn = await running
    assert next(stage for stage in drawn.stages if stage.stage == "denoiser").attempt_count == 2
    assert watcher.steps == sorted(set(watcher.steps))


async def test_kill_9_of_a_denoiser_under_load_costs_its_callers_a_step_at_most(
    fragile: LocalCluster, client: Client
) -> None:
    """By the stage's own API: the callers go on at the other denoiser from the last checkpoint they have."""
    await wait_until_both_denoisers_are_up(client)
    one, two = [
        report.listed.address for report in await client.replicas() if report.listed.replica_id.startswith("denoiser")
    ]
    async with grpc.aio.insecure_channel(one) as dying, grpc.aio.insecure_channel(two) as surviving:
        callers = [StageCaller(seed) for seed in range(8)]
        calls = [asyncio.create_task(caller.run(dying)) for caller in callers]
        async with asyncio.timeout(60):
            while max(caller.heard_step for caller in callers) < 5:
                await asyncio.sleep(0.01)
        os.kill(pid_of(fragile, one), signal.SIGKILL)
        for failure in await asyncio.gather(*calls, return_exceptions=True):
            assert isinstance(failure, grpc.aio.AioRpcError)
            assert failure.code() is grpc.StatusCode.UNAVAILABLE
        heard = [caller.heard_step for caller in callers]
        assert 5 <= max(heard) < STAGE_STEPS
        await asyncio.gather(*(caller.run(surviving) for caller in callers))
        assert [caller.forward_count for caller in callers] == [STAGE_STEPS - step for step in heard]
        moved = [caller.latents for caller in callers]
        untouched = [StageCaller(seed) for seed in range(8)]
        await asyncio.gather(*(caller.run(surviving) for caller in untouched))
        assert moved == [caller.latents for caller in untouched], "the same latents, bit for bit"
    await wait_until_both_denoisers_are_up(client)


STAGE_STEPS = 100
NOISE = random.Random(0)
EMBEDDINGS = [
    tensor_pb2.NamedTensor(
        name=name,
        tensor=tensor_pb2.Tensor(
            element_type=tensor_pb2.ELEMENT_TYPE_FLOAT32,
            shape=[1, 8, 32],
            data=struct.pack("<256f", *(NOISE.gauss(0, 1) for _ in range(256))),
        ),
    )
    for name in ("prompt_embeds", "negative_prompt_embeds")
]


class StageCaller:
    """A caller of the denoiser that keeps the last checkpoint it heard, and starts from it when it calls again."""

    def __init__(self, seed: int) -> None:
        self.request = denoiser_pb2.DenoiseRequest(
            model_id="tiny-sd", embeddings=EMBEDDINGS, width_px=32, height_px=32, step_count=STAGE_STEPS,
            guidance_scale=5.0, seed=seed, image_count=1, scheduler="euler_a", checkpoint_interval=1,
            deterministic=True, run_id=f"run-{seed}",
        )  # fmt: skip
        self.heard_step = 0
        self.forward_count = 0
        self.latents = b""

    async def run(self, channel: grpc.aio.Channel) -> None:
        self.request.epoch += 1
        async for event in denoiser_pb2_grpc.DenoiserServiceStub(channel).Denoise(self.request, timeout=60):
            if event.HasField("progress"):
                self.heard_step = event.progress.step
                self.request.checkpoint.CopyFrom(event.progress.checkpoint)
            elif event.HasField("result"):
                self.latents, self.forward_count = event.result.latents.data, event.result.forward_count
