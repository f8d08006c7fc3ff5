"""A cluster whose model store is a URL: cold and warm, with the store down, bad files, and little room on devices."""

import asyncio
import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from darkroom.client import Client, Drawing
from darkroom.errors import ModelNotFound, Overloaded, StoreUnavailable, UnusableModel
from darkroom.runtime.cluster import ClusterConfig, LocalCluster
from darkroom.store.indexing import write_index
from tests.shipped import SHAPES
from tests.store.servers import Nginx, needs_nginx, nginx

pytestmark = [needs_nginx, pytest.mark.asyncio(loop_scope="module")]
_UNET = "unet/diffusion_pytorch_model.safetensors"
_WAIT_S = 60.0


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copies of the shipped model: `second` and `third` have UNets of their own, all share the rest."""
    root = tmp_path_factory.mktemp("remote")
    for number, name in enumerate(("shapes", "second", "third", "bad", "late")):
        shutil.copytree(SHAPES, root / name)
        content = bytearray((root / name / _UNET).read_bytes())
        content[-1] ^= number
        (root / name / _UNET).write_bytes(content)
    write_index(root)
    content = bytearray((root / "bad" / _UNET).read_bytes())
    content[-100] ^= 1
    (root / "bad" / _UNET).write_bytes(content)
    return root


@pytest.fixture(scope="module")
def web(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nginx]:
    with nginx(files, tmp_path_factory.mktemp("nginx")) as server:
        yield server


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(web: Nginx, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalCluster]:
    """Two denoisers, each with room for one UNet."""
    budget_bytes = 3 * (SHAPES / _UNET).stat().st_size  # it is stored in half precision, and runs in single
    config = ClusterConfig(
        denoisers=2,
        model_store=web.url,
        store_cache=cache,
        device_budget_bytes=budget_bytes,
        log_folder=tmp_path_factory.mktemp("logs"),
    )
    async with LocalCluster(config) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def client(cluster: LocalCluster) -> AsyncIterator[Client]:
    async with Client(
        router_address=cluster.addresses.router, cachemgr_address=cluster.addresses.cachemgr
    ) as connected:
        yield connected


def _drawing(model_id: str, seed: int = 1) -> Drawing:
    return Drawing(prompt="a large red circle in the center", model_id=model_id, seed=seed, step_count=4)


async def _draw(client: Client, model_id: str, seed: int = 1) -> None:
    """Asks again where the cluster is full, as it says."""
    async with asyncio.timeout(_WAIT_S):
        while True:
            try:
                await client.draw(_drawing(model_id, seed), timeout_s=_WAIT_S)
            except Overloaded as full:
                await asyncio.sleep(full.retry_after_s)
            else:
                return


async def test_the_catalogue_is_that_of_the_store(client: Client) -> None:
    catalogue = await client.catalogue()
    assert {model.model_id for model in catalogue.models} == {"shapes", "second", "third", "bad", "late"}


async def test_a_hundred_requests_for_a_cold_model_are_one_fetch(client: Client, web: Nginx) -> None:
    await asyncio.gather(*(_draw(client, "second", seed) for seed in range(100)))
    assert web.fetch_count(f"second/{_UNET}") == 1


async def test_models_share_what_they_have_in_common_and_take_turns_on_the_device(client: Client, web: Nginx) -> None:
    for model_id in ("shapes", "third", "shapes", "third", "second", "shapes"):
        await client.draw(_drawing(model_id), timeout_s=_WAIT_S)
    fetched = web.access_log.read_text()
    assert fetched.count("/vae/diffusion_pytorch_model.safetensors HTTP") == 1
    assert fetched.count("/text_encoder/model.safetensors HTTP") == 1
    held = [list(report.state.models) for report in await client.replicas() if report.state and report.state.stage == 2]
    assert all(len(models) <= 1 for models in held)


async def test_a_corrupt_model_is_refused_and_others_serve(client: Client) -> None:
    with pytest.raises(UnusableModel, match="not what its manifest says"):
        await client.draw(_drawing("bad"), timeout_s=_WAIT_S)
    await client.draw(_drawing("shapes"), timeout_s=_WAIT_S)


async def test_an_unknown_model_is_not_found(client: Client) -> None:
    with pytest.raises(ModelNotFound):
        await client.draw(_drawing("nowhere"), timeout_s=_WAIT_S)


async def test_a_file_that_goes_bad_on_the_disk_is_fetched_again(client: Client, web: Nginx, cache: Path) -> None:
    before = web.fetch_count(f"second/{_UNET}")
    (file,) = cache.glob(f"stores/*/second/{_UNET}")
    file.chmod(0o644)
    with file.open("r+b") as opened:
        opened.seek(-1, 2)
        opened.write(b"?")
    for _ in range(5):  # until others have pushed it off both denoisers
        await asyncio.gather(*(_draw(client, model_id, seed) for model_id in ("shapes", "third") for seed in range(4)))
        await _draw(client, "second")
        if web.fetch_count(f"second/{_UNET}") > before:
            break
    assert web.fetch_count(f"second/{_UNET}") == before + 1
    assert len(list((cache / "quarantine").iterdir())) == 1


async def test_with_the_store_down_what_is_here_still_serves(client: Client, web: Nginx) -> None:
    with web.stopped():
        await client.draw(_drawing("second"), timeout_s=_WAIT_S)
        await client.draw(_drawing("shapes"), timeout_s=_WAIT_S)
    web.stop()
    await client.draw(_drawing("third"), timeout_s=_WAIT_S)
    with pytest.raises(StoreUnavailable, match="does not answer"):
        await client.draw(_drawing("late"), timeout_s=_WAIT_S)
    assert len((await client.catalogue()).models) == 5
