"""One real cluster for the end-to-end tests: etcd and every service as a process, over real and tiny models."""

import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from darkroom.client import Client
from darkroom.runtime.cluster import ClusterConfig, LocalCluster
from tests.shipped import MODELS


@pytest.fixture(scope="session")
def store(tiny_store: Path) -> Path:
    """The tiny models and those that ship."""
    shutil.copytree(MODELS, tiny_store, dirs_exist_ok=True)
    return tiny_store


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def cluster(store: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalCluster]:
    """One replica of each stage; refs from 1 KiB on, so that tensors travel that way too."""
    config = ClusterConfig(
        denoisers=1,
        model_store=store,
        inline_limit_bytes=1024,
        reflection=True,
        log_folder=tmp_path_factory.mktemp("logs"),
    )
    async with LocalCluster(config) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="session")
async def client(cluster: LocalCluster) -> AsyncIterator[Client]:
    """A client of the cluster."""
    async with Client(
        router_address=cluster.addresses.router, cachemgr_address=cluster.addresses.cachemgr
    ) as connected:
        yield connected
