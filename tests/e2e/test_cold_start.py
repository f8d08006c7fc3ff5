"""A model that nobody holds, on a real cluster: its stages load at once, and a death among them costs no request."""

import asyncio
import json
import os
import shutil
import signal
from collections.abc import AsyncIterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from darkroom.client import Client, Drawing, Drawn
from darkroom.runtime.cluster import ClusterConfig, LocalCluster
from tests.shipped import SHAPES

pytestmark = pytest.mark.asyncio(loop_scope="module")
_WAIT_S = 120.0


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalCluster]:
    """Two denoisers, and models that nobody has asked for."""
    store = tmp_path_factory.mktemp("models")
    for name in ("first", "second"):
        shutil.copytree(SHAPES, store / name)
    config = ClusterConfig(
        denoisers=2, model_store=store, default_model="first", log_folder=tmp_path_factory.mktemp("logs")
    )
    async with LocalCluster(config) as started:
        yield started


@pytest_asyncio.fixture(loop_scope="module")
async def client(cluster: LocalCluster) -> AsyncIterator[Client]:
    async with Client(router_address=cluster.addresses.router) as connected:
        yield connected


async def draw(client: Client, model_id: str) -> Drawn:
    return await client.draw(Drawing(prompt="a red ring", model_id=model_id, seed=1, step_count=4), timeout_s=_WAIT_S)


def events(cluster: LocalCluster, name: str, model_id: str) -> list[dict[str, Any]]:
    """What the stages logged of this name about a model."""
    logs = [child.log.read_text() for child in cluster.children if child.name != "etcd"]
    lines = [line for log in logs for line in log.splitlines() if f'"event": "{name}"' in line]
    return [event for event in map(json.loads, lines) if event.get("model_id") == model_id]


def time_of(event: dict[str, Any]) -> datetime:
    return datetime.fromisoformat(event["timestamp"])


async def test_the_other_stages_begin_to_load_before_the_encoder_has_its_part(
    cluster: LocalCluster, client: Client
) -> None:
    drawn = await draw(client, "first")
    begun = {event["service"]: event for event in events(cluster, "preparing", "first")}
    loaded = {event["service"]: event for event in events(cluster, "loaded", "first")}
    assert sorted(begun) == ["denoiser", "vae"]
    assert sorted(loaded) == ["denoiser", "encoder", "vae"]
    for stage, event in begun.items():
        assert time_of(event) < time_of(loaded["encoder"]), stage
        assert event["replica_id"] == loaded[stage]["replica_id"]
    assert {time.replica_id for time in drawn.stages} == {event["replica_id"] for event in loaded.values()}
    assert len(events(cluster, "loaded", "first")) == 3, "each stage loads once"


async def test_a_warm_model_is_not_prepared(cluster: LocalCluster, client: Client) -> None:
    await draw(client, "first")
    before = len(events(cluster, "preparing", "first"))
    await draw(client, "first")
    assert len(events(cluster, "preparing", "first")) == before


async def test_the_request_survives_the_death_of_the_denoiser_that_was_preparing(
    cluster: LocalCluster, client: Client
) -> None:
    drawing = asyncio.ensure_future(draw(client, "second"))
    async with asyncio.timeout(_WAIT_S):
        while not (begun := [e for e in events(cluster, "preparing", "second") if e["service"] == "denoiser"]):
            await asyncio.sleep(0.005)
    dying = begun[0]["replica_id"]
    os.kill(pid_of(cluster, dying), signal.SIGKILL)
    drawn = await drawing
    assert drawn.images
    (denoiser,) = [time.replica_id for time in drawn.stages if time.stage == "denoiser"]
    assert denoiser != dying


def pid_of(cluster: LocalCluster, replica_id: str) -> int:
    (child,) = [child for child in cluster.children if f'"replica_id": "{replica_id}"' in denoiser_log(child.log)]
    assert child.pid is not None
    return child.pid


def denoiser_log(log: Path) -> str:
    return log.read_text() if log.name.startswith("denoiser") else ""
