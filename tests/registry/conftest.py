"""A real etcd for the tests of the registry: one for all that leave it as it was, or one's own to break."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from darkroom.registry.etcd import EtcdRegistry
from darkroom.registry.memory import MemoryRegistry
from darkroom.registry.port import Registry
from tests.registry.etcd_process import EtcdProcess, find_program
from tests.registry.line import Line


@pytest.fixture(scope="session")
def shared_etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdProcess]:
    """An etcd for tests that do not stop it."""
    yield from _run_etcd(tmp_path_factory.mktemp("etcd") / "data")


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[EtcdProcess]:
    """An etcd of the test's own, to stop and to freeze."""
    yield from _run_etcd(tmp_path / "data")


@pytest.fixture(params=["memory", "etcd"])
async def registry(request: pytest.FixtureRequest) -> AsyncIterator[Registry]:
    """An empty registry of either kind."""
    if request.param == "memory":
        yield MemoryRegistry()
        return
    shared: EtcdProcess = request.getfixturevalue("shared_etcd")
    connected = EtcdRegistry([shared.endpoint])
    for key in await connected.read("/"):
        await connected.delete(key)
    yield connected
    await connected.close()


@pytest.fixture
async def etcd_registry(etcd: EtcdProcess) -> AsyncIterator[EtcdRegistry]:
    """A client of the test's own etcd."""
    connected = EtcdRegistry([etcd.endpoint])
    yield connected
    await connected.close()


@pytest.fixture
async def line(etcd: EtcdProcess) -> AsyncIterator[Line]:
    """A way to the test's own etcd that can be cut."""
    opened = Line(etcd.endpoint)
    yield opened
    await opened.close()


def _run_etcd(data_dir: Path) -> Iterator[EtcdProcess]:
    if find_program("etcd") is None:
        pytest.skip("no etcd on PATH")
    process = EtcdProcess(data_dir)
    try:
        process.start()
        yield process
    finally:
        process.stop()
