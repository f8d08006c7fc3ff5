"""A cluster whose model store is a URL, under load: cold models, wrong files, a store slow or down, a full disk."""

import asyncio
import contextlib
import os
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from darkroom.client import Client
from darkroom.errors import ModelNotFound, StoreUnavailable, UnusableModel
from darkroom.runtime.cluster import ClusterConfig, LocalCluster
from darkroom.store.indexing import write_index
from tests.e2e.history import Load, ask
from tests.registry.following import until
from tests.store.disks import fill, needs_root, small_disk
from tests.store.servers import Nginx, needs_nginx, nginx
from tests.tiny_models import save_tiny_model

pytestmark = [needs_nginx, pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]
_UNET = "unet/diffusion_pytorch_model.safetensors"
_LOADED = ("one", "two", "three", "four")
_WRONG: dict[str, Callable[[bytes, bytes], bytes]] = {
    "corrupt": lambda own, _: own[:-100] + bytes([own[-100] ^ 1]) + own[-99:],
    "truncated": lambda own, _: own[: len(own) // 2],
    "swapped": lambda _, other: other,
}
_OTHERS = ("cold", "slow", "late", "later", "full-1", "full-2", *_WRONG)
_GIVEN_UP_S = 25.0
"""After which a store that hangs is, at the most: two reads that get no byte for ten seconds."""
_SLOW, _SLOW_S = "location /slow/unet/ { limit_rate 500k; }", 7.0
"""A UNet of 4 MB takes eight seconds."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models with UNets of their own that share the rest. Three are not what their manifests say."""
    root = tmp_path_factory.mktemp("remote")
    save_tiny_model(root, "tiny-sd")
    (root / "tiny-sd").rename(root / "one")
    for number, name in enumerate((*_LOADED[1:], *_OTHERS), 1):
        shutil.copytree(root / "one", root / name)
        content = bytearray((root / name / _UNET).read_bytes())
        content[-1] ^= number
        (root / name / _UNET).write_bytes(content)
    write_index(root)
    for name, change in _WRONG.items():
        (root / name / _UNET).write_bytes(
            change((root / name / _UNET).read_bytes(), (root / "two" / _UNET).read_bytes())
        )
    return root


@pytest.fixture(scope="module")
def web(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nginx]:
    with nginx(files, tmp_path_factory.mktemp("nginx"), inside=_SLOW) as server:
        yield server


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the node keeps what it has fetched: a small disk of its own where one can be mounted."""
    folder = tmp_path_factory.mktemp("disk")
    with small_disk(folder, 96 << 20) if os.getuid() == 0 else contextlib.nullcontext():
        yield folder


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(
    web: Nginx, files: Path, disk: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[LocalCluster]:
    """As fault tests want it. A denoiser has room for two UNets: models come from the disk again and again."""
    config = ClusterConfig(
        routers=2, encoders=2, denoisers=3, vaes=2, cachemgrs=2,
        model_store=web.url, store_cache=disk, host_cache_bytes=0, default_model="one",
        device_budget_bytes=int(2.5 * (files / "one" / _UNET).stat().st_size),
        log_folder=tmp_path_factory.mktemp("logs"),
    )  # fmt: skip
    async with LocalCluster(config) as started:
        yield started


@pytest_asyncio.fixture(loop_scope="module")
async def client(cluster: LocalCluster) -> AsyncIterator[Client]:
    async with Client(
        router_address=cluster.addresses.router, cachemgr_address=cluster.addresses.cachemgr
    ) as connected:
        yield connected


async def test_the_catalogue_is_that_of_the_store(client: Client) -> None:
    catalogue = await client.catalogue()
    assert {model.model_id for model in catalogue.models} == {*_LOADED, *_OTHERS}


async def test_an_unknown_model_is_not_found_and_what_models_share_is_fetched_once(
    cluster: LocalCluster, client: Client, web: Nginx
) -> None:
    async with Load(cluster, _LOADED) as load:
        unknown = await ask(load.routers[0], "nowhere", seed=1)
        assert isinstance(unknown.error, ModelNotFound)
    fetched = web.access_log.read_text()
    assert fetched.count("/vae/diffusion_pytorch_model.safetensors HTTP") == 1
    assert fetched.count("/text_encoder/model.safetensors HTTP") == 1
    assert [web.fetch_count(f"{model_id}/{_UNET}") for model_id in _LOADED] == [1] * len(_LOADED)
    states = [report.state for report in await client.replicas() if report.listed.replica_id.startswith("denoiser")]
    assert all(state and len(state.models) <= 2 for state in states)


async def test_a_hundred_requests_for_a_cold_model_are_one_fetch(cluster: LocalCluster, web: Nginx) -> None:
    async with Load(cluster, _LOADED) as load:
        asked = await asyncio.gather(*(ask(load.routers[seed % 2], "cold", seed=seed % 5) for seed in range(100)))
        assert [entry.error for entry in asked] == [None] * 100
        assert len({(entry.key, *entry.digests) for entry in asked}) == 5, "a picture per seed"
        assert web.fetch_count(f"cold/{_UNET}") == 1


async def test_wrong_files_in_the_store_are_refused_and_quarantined_and_others_serve(
    cluster: LocalCluster, files: Path, disk: Path, web: Nginx
) -> None:
    async with Load(cluster, _LOADED) as load:
        before = {name: web.fetch_count(f"{name}/{_UNET}") for name in _WRONG}
        for name in _WRONG:
            for entry in await asyncio.gather(*(ask(load.routers[seed % 2], name, seed) for seed in range(4))):
                assert isinstance(entry.error, UnusableModel)
                assert "not what its manifest says" in entry.error.message
        kept = {path.read_bytes() for path in (disk / "quarantine").iterdir()}
        assert kept == {(files / name / _UNET).read_bytes() for name in _WRONG}
        processes = 3  # each denoiser finds it out for itself, and then lets it be
        assert all(1 <= web.fetch_count(f"{name}/{_UNET}") - before[name] <= processes for name in _WRONG)
        await load.goes_on(30)


@pytest.mark.parametrize("damage", ["truncated", "swapped", pytest.param("corrupt", marks=pytest.mark.long)])
async def test_a_file_that_goes_bad_on_the_disk_is_quarantined_and_fetched_again(
    cluster: LocalCluster, web: Nginx, disk: Path, damage: str
) -> None:
    """A model under load, that comes from there again and again; nobody notices."""
    model_id, other = "three", "four"
    async with Load(cluster, _LOADED) as load:
        before = web.fetch_count(f"{model_id}/{_UNET}")
        (file,), (beside,) = (disk.glob(f"stores/*/{each}/{_UNET}") for each in (model_id, other))
        content = _WRONG[damage](file.read_bytes(), beside.read_bytes())
        file.chmod(0o644)
        file.write_bytes(content)
        await until(lambda: web.fetch_count(f"{model_id}/{_UNET}") > before, within_s=30)
        await load.goes_on(30)
        assert web.fetch_count(f"{model_id}/{_UNET}") == before + 1
        assert content in [path.read_bytes() for path in (disk / "quarantine").iterdir()]


async def test_nobody_waits_for_a_slow_store_but_whoever_asks_for_what_is_there(
    cluster: LocalCluster, web: Nginx
) -> None:
    async with Load(cluster, _LOADED) as load:
        slow, rounds = asyncio.create_task(ask(load.routers[0], "slow", seed=1)), 0
        while not slow.done():
            await load.goes_on(5)
            rounds += 1
        entry = await slow
        assert entry.digests
        assert entry.end_s - entry.start_s > _SLOW_S
        assert rounds > 1
        assert load.longest_s(entry.start_s) < entry.end_s - entry.start_s
        assert web.fetch_count(f"slow/{_UNET}") == 1


async def test_with_the_store_hanging_or_down_what_is_here_still_serves(cluster: LocalCluster, web: Nginx) -> None:
    async with Load(cluster, _LOADED) as load:
        with web.stopped():
            late = asyncio.create_task(ask(load.routers[0], "late", seed=1))
            while not late.done():
                await load.goes_on(10)
        refused = await late
        assert isinstance(refused.error, StoreUnavailable)
        assert refused.end_s - refused.start_s < _GIVEN_UP_S
        assert (await ask(load.routers[0], "late", seed=1)).digests, "the store is back"
        with web.down():
            assert isinstance((await ask(load.routers[1], "later", seed=1)).error, StoreUnavailable)
            await load.goes_on(50)
        assert (await ask(load.routers[1], "later", seed=1)).digests


@needs_root
async def test_with_the_disk_full_cold_models_are_served_and_nothing_partial_is_seen(
    cluster: LocalCluster, disk: Path
) -> None:
    async with Load(cluster, _LOADED) as load:
        somebody_elses = fill(disk)
        for name in ("full-1", "full-2"):
            entries = await asyncio.gather(*(ask(router, name, seed=1) for router in load.routers))
            assert all(entry.digests for entry in entries), entries
            assert len({entry.digests[0] for entry in entries}) == 1
        assert list((disk / "partial").iterdir()) == []
        await load.goes_on(50)
        somebody_elses.unlink()
        assert (await ask(load.routers[0], "full-1", seed=2)).digests
