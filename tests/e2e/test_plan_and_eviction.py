"""The cache manager's plan decides what leaves a full device: by its rates of the cluster, never what is pinned."""

import asyncio
import json
import shutil
from collections.abc import AsyncIterator

import grpc
import pytest
import pytest_asyncio
import torch

from darkroom.client import Client, Drawing
from darkroom.models.loader import part_sizes
from darkroom.registry.cache_plan import PlanView
from darkroom.registry.etcd import EtcdRegistry
from darkroom.runtime.cluster import ClusterConfig, LocalCluster
from darkroom.v1 import cachemgr_pb2, cachemgr_pb2_grpc, stage_pb2
from darkroom.wire.times import duration
from tests.registry.following import running, until
from tests.tiny_models import save_tiny_model

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.slow]
_WAIT_S = 120.0


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalCluster]:
    """A replica of each stage, whose devices have room for two of three models."""
    store = tmp_path_factory.mktemp("models")
    save_tiny_model(store, "tiny-sd")
    for name in ("ours", "theirs", "third"):
        shutil.copytree(store / "tiny-sd", store / name)
    sizes = part_sizes(store, "ours", "denoiser", torch.device("cpu"))
    config = ClusterConfig(
        denoisers=1,
        model_store=store,
        default_model="ours",
        device_budget_bytes=2 * sum(sizes.values()),
        log_folder=tmp_path_factory.mktemp("logs"),
    )
    async with LocalCluster(config) as started:
        yield started


@pytest_asyncio.fixture(loop_scope="module")
async def client(cluster: LocalCluster) -> AsyncIterator[Client]:
    async with Client(
        router_address=cluster.addresses.router, cachemgr_address=cluster.addresses.cachemgr
    ) as connected:
        yield connected


@pytest_asyncio.fixture(loop_scope="module")
async def plans(cluster: LocalCluster) -> AsyncIterator[PlanView]:
    registry = EtcdRegistry([cluster.addresses.etcd])
    view = PlanView(registry)
    async with running(view.run()):
        yield view
    await registry.close()


async def _draw(client: Client, *model_ids: str) -> None:
    for model_id in model_ids:
        drawing = Drawing(prompt="a ring", model_id=model_id, width_px=32, height_px=32, step_count=2, seed=1)
        await client.draw(drawing, timeout_s=_WAIT_S)


async def _report(cluster: LocalCluster, model_id: str, count: int) -> None:
    """What another router's requests used, at replicas that this cluster does not have."""
    usage = cachemgr_pb2.Usage(
        stage=stage_pb2.STAGE_DENOISER, model_id=model_id, count=count, run_duration=duration(count * 1.0)
    )
    request = cachemgr_pb2.ReportUsageRequest(reporter_id="another-router", sequence=1, usages=[usage])
    async with grpc.aio.insecure_channel(cluster.addresses.cachemgr) as channel:
        assert (await cachemgr_pb2_grpc.CacheManagerServiceStub(channel).ReportUsage(request, timeout=5)).counted


def _dropped(cluster: LocalCluster) -> list[tuple[str, str]]:
    """What the denoiser's device let go, and for which model."""
    lines = [json.loads(line) for line in cluster.child("denoiser-1").log.read_text().splitlines() if line[:1] == "{"]
    return [(line["model_id"], line["for_model"]) for line in lines if line.get("event") == "dropped"]


def _rate(plans: PlanView, model_id: str) -> float:
    found = [outlook.stages for outlook in plans.plan.outlooks if outlook.model_id == model_id]
    return found[0]["denoiser"].rate if found and "denoiser" in found[0] else 0.0


async def test_the_plans_rates_and_not_what_a_replica_saw_itself_decide_what_leaves(
    cluster: LocalCluster, client: Client, plans: PlanView
) -> None:
    await _draw(client, "theirs", "ours", "ours", "ours")
    await _report(cluster, "theirs", 3000)
    await until(lambda: _rate(plans, "theirs") > 10 * _rate(plans, "ours") > 0.0, within_s=30.0)
    await asyncio.sleep(1.0)  # four looks of the replica at the plan
    assert _dropped(cluster) == []
    await _draw(client, "third")
    assert _dropped(cluster)[0] == ("ours", "third")


async def test_what_an_operator_pinned_stays_whatever_is_asked_for(
    cluster: LocalCluster, client: Client, plans: PlanView
) -> None:
    await client.pin("third")
    await until(lambda: any(pin.model_id == "third" for pin in plans.plan.pinned), within_s=30.0)
    await asyncio.sleep(1.0)
    await _draw(client, "third")
    before = len(_dropped(cluster))
    await _draw(client, "ours", "theirs", "ours", "tiny-sd", "theirs")
    after = _dropped(cluster)[before:]
    assert len(after) >= 3
    assert "third" not in {model_id for model_id, _ in after}
    await client.unpin("third")
