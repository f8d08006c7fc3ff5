"""Two cache managers and a real etcd: what is popular spreads unasked, and the loss of a leader harms nobody."""

import asyncio
import json
import os
import shutil
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

import grpc
import pytest
import pytest_asyncio

from darkroom.client import Client, Drawing
from darkroom.registry import keys
from darkroom.registry.cache_plan import parse_plan
from darkroom.registry.etcd import EtcdRegistry
from darkroom.runtime.cluster import ClusterConfig, LocalCluster
from darkroom.v1 import cachemgr_pb2, cachemgr_pb2_grpc, stage_pb2
from darkroom.wire.times import duration
from tests.e2e.history import Load
from tests.registry.following import running
from tests.tiny_models import save_tiny_model

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.slow]
LEASE_S = 5
MODELS = ("tiny-sd", "other")
DENOISER = stage_pb2.STAGE_DENOISER
DRAWING = Drawing(prompt="a ring", model_id="tiny-sd", width_px=32, height_px=32, step_count=4, seed=1)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalCluster]:
    """Two cache managers that plan every half second, stages and routers as fault tests want them, three models."""
    store = tmp_path_factory.mktemp("models")
    save_tiny_model(store, "tiny-sd")
    for name in ("other", "third"):
        shutil.copytree(store / "tiny-sd", store / name)
    config = ClusterConfig(
        routers=2, encoders=2, denoisers=3, vaes=2, cachemgrs=2,
        model_store=store, default_model="tiny-sd", log_folder=tmp_path_factory.mktemp("logs"),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DARKROOM_PLAN_INTERVAL_S", "0.5")
        patch.setenv("DARKROOM_LEASE_S", str(LEASE_S))
        async with LocalCluster(config) as running_cluster:
            yield running_cluster


@pytest_asyncio.fixture(loop_scope="module")
async def client(cluster: LocalCluster) -> AsyncIterator[Client]:
    async with Client(
        router_address=cluster.addresses.router, cachemgr_address=cluster.addresses.cachemgr
    ) as connected:
        yield connected


class Managers:
    """The cache managers that run now, each asked by its own address."""

    def __init__(self, cluster: LocalCluster) -> None:
        self.cluster = cluster
        self._channels: list[grpc.aio.Channel] = []

    def stubs(self) -> dict[str, cachemgr_pb2_grpc.CacheManagerServiceStub]:
        """By child, those that say where they listen."""
        found = {}
        for child in self.cluster.children:
            ports = [line.split('"port": ')[1] for line in _lines(child.log) if '"port": ' in line]
            if child.name.startswith("cachemgr") and child.pid is not None and ports:
                channel = grpc.aio.insecure_channel(f"127.0.0.1:{int(ports[-1].split(',')[0].rstrip('}'))}")
                self._channels.append(channel)
                found[child.name] = cachemgr_pb2_grpc.CacheManagerServiceStub(channel)
        return found

    async def describe(self) -> dict[str, cachemgr_pb2.DescribeCacheResponse]:
        """What those that answer say, by child."""
        answers = {}
        for name, stub in self.stubs().items():
            try:
                answers[name] = await stub.DescribeCache(cachemgr_pb2.DescribeCacheRequest(), timeout=1)
            except grpc.aio.AioRpcError:
                continue
        return answers

    async def until(
        self, holds: Callable[[dict[str, cachemgr_pb2.DescribeCacheResponse]], bool], *, within_s: float
    ) -> dict[str, cachemgr_pb2.DescribeCacheResponse]:
        """What they say as soon as it is so."""
        answers = {}
        try:
            async with asyncio.timeout(within_s):
                while not holds(answers := await self.describe()):
                    await asyncio.sleep(0.1)
        except TimeoutError:
            raise AssertionError(f"not within {within_s} s: {answers}") from None
        return answers

    async def leader(self) -> str:
        """The child that leads, as soon as both agree."""
        answers = await self.until(
            lambda answers: len(answers) == 2 and len({a.leader_id for a in answers.values()}) == 1, within_s=60
        )
        return next(name for name, answer in answers.items() if answer.manager_id == answer.leader_id)

    async def report(self, sequence: int, *, count: int, model_id: str) -> None:
        """Tells all of them, as a router does."""
        usage = cachemgr_pb2.Usage(stage=DENOISER, model_id=model_id, count=count, run_duration=duration(count * 1.0))
        request = cachemgr_pb2.ReportUsageRequest(reporter_id="busy-router", sequence=sequence, usages=[usage])
        for stub in self.stubs().values():
            assert (await stub.ReportUsage(request, timeout=5)).counted

    async def close(self) -> None:
        """Ends the connections."""
        await asyncio.gather(*(channel.close() for channel in self._channels))


@pytest_asyncio.fixture(loop_scope="module")
async def managers(cluster: LocalCluster) -> AsyncIterator[Managers]:
    opened = Managers(cluster)
    yield opened
    await opened.close()


@asynccontextmanager
async def terms_of(cluster: LocalCluster) -> AsyncIterator[list[int]]:
    """The terms of the plans that stand in etcd, one after the other."""
    registry, terms = EtcdRegistry([cluster.addresses.etcd]), list[int]()

    async def follow() -> None:
        async for state in registry.watch(keys.PLAN):
            terms.extend(parse_plan(value).term for value in state.values())

    async with running(follow()):
        yield terms
    await registry.close()


def _lines(log: Path) -> list[str]:
    return log.read_text().splitlines()


def _holders(answer: cachemgr_pb2.DescribeCacheResponse, model_id: str) -> set[str]:
    return {r.replica_id for r in answer.replicas if r.stage == DENOISER and model_id in r.model_ids}


def _orders(answer: cachemgr_pb2.DescribeCacheResponse) -> list[tuple[str, str]]:
    return [(order.replica_id, order.model_id) for order in answer.plan.orders]


def _pid(cluster: LocalCluster, name: str) -> int:
    pid = cluster.child(name).pid
    assert pid is not None
    return pid


async def test_what_is_popular_comes_to_replicas_that_nobody_asked(client: Client, managers: Managers) -> None:
    for _ in range(3):
        await client.draw(DRAWING)
    answers = await managers.until(
        lambda answers: len(answers) == 2 and all(a.popularities for a in answers.values()), within_s=20
    )
    assert [len(_holders(answer, "tiny-sd")) for answer in answers.values()] == [1, 1]
    await managers.report(1, count=3000, model_id="tiny-sd")
    await managers.until(lambda a: all(len(_holders(one, "tiny-sd")) == 3 for one in a.values()), within_s=30)
    denoisers = [report.state for report in await client.replicas() if report.listed.stage == DENOISER]
    assert sorted(state.finished_count for state in denoisers if state) == [0, 0, 3]


async def test_a_leader_that_is_killed_is_followed_within_its_lease_and_no_model_is_dropped(
    cluster: LocalCluster, managers: Managers
) -> None:
    async with Load(cluster, MODELS) as load:
        name = await managers.leader()
        (before,) = [answer for child, answer in (await managers.describe()).items() if child == name]
        assert _orders(before)
        held = {model_id: _holders(before, model_id) for model_id in MODELS}
        os.kill(_pid(cluster, name), signal.SIGKILL)
        killed_at = datetime.now(UTC)

        def has_new_leader(answers: dict[str, cachemgr_pb2.DescribeCacheResponse]) -> bool:
            assert all(_holders(answer, model_id) >= held[model_id] for answer in answers.values() for model_id in held)
            return any(a.leader_id == a.manager_id != before.leader_id for a in answers.values())

        answers = await managers.until(has_new_leader, within_s=LEASE_S + 15.0)
        follower = next(child for child, answer in answers.items() if answer.leader_id == answer.manager_id)
        led = [json.loads(line) for line in _lines(cluster.child(follower).log) if '"event": "leads"' in line]
        assert (datetime.fromisoformat(led[-1]["timestamp"]) - killed_at).total_seconds() <= LEASE_S + 2.0
        answers = await managers.until(
            lambda answers: any(a.plan.term > before.plan.term for a in answers.values()), within_s=10
        )
        after = next(a for a in answers.values() if a.plan.term > before.plan.term)
        assert set(_orders(after)) >= set(_orders(before))
        await load.goes_on(50)


async def test_a_leader_stopped_past_its_lease_writes_nothing_when_it_wakes_up(
    cluster: LocalCluster, managers: Managers
) -> None:
    async with Load(cluster, MODELS) as load, terms_of(cluster) as terms:
        name = await managers.leader()
        stopped = (await managers.describe())[name]
        os.kill(_pid(cluster, name), signal.SIGSTOP)
        try:
            await managers.until(
                lambda answers: any(a.plan.term > stopped.plan.term for a in answers.values()), within_s=LEASE_S + 8.0
            )
        finally:
            os.kill(_pid(cluster, name), signal.SIGCONT)
        await managers.until(
            lambda answers: name in answers and answers[name].leader_id != stopped.manager_id, within_s=15
        )
        await managers.report(2, count=10, model_id="other")
        await asyncio.sleep(3)  # six plans of the zombie's, if it made any
        assert len(terms) >= 2
        assert terms == sorted(terms)
        assert (await managers.describe())[name].manager_id == stopped.manager_id, "it is the same process"
        await load.goes_on(50)


async def test_without_etcd_requests_are_served_and_managers_answer(cluster: LocalCluster, managers: Managers) -> None:
    async with Load(cluster, MODELS) as load:
        await managers.leader()
        os.kill(_pid(cluster, "etcd"), signal.SIGSTOP)
        try:
            for seconds in (0.0, LEASE_S + 2.0):
                await asyncio.sleep(seconds)
                await load.goes_on(30)
                await managers.until(lambda answers: len(answers) == 2, within_s=10)
        finally:
            os.kill(_pid(cluster, "etcd"), signal.SIGCONT)
        await managers.leader()
        await load.goes_on(30)


async def test_an_operators_wishes_reach_the_replicas(managers: Managers) -> None:
    await managers.leader()
    await managers.until(lambda a: all(len(one.replicas) == 7 for one in a.values()), within_s=30)  # etcd was away
    stub = next(iter(managers.stubs().values()))
    await stub.Prefetch(cachemgr_pb2.PrefetchRequest(model_id="third", copy_count=2), timeout=5)
    await managers.until(lambda a: all(len(_holders(one, "third")) == 2 for one in a.values()), within_s=30)
    await stub.Pin(cachemgr_pb2.PinRequest(model_id="third", copy_count=1), timeout=5)
    await managers.until(lambda a: all(one.plan.keeps for one in a.values()), within_s=20)
    await stub.Drop(cachemgr_pb2.DropRequest(model_id="third", stage=DENOISER), timeout=5)
    await managers.until(lambda a: all(len(_holders(one, "third")) == 1 for one in a.values()), within_s=30)
    await stub.Pin(cachemgr_pb2.PinRequest(model_id="third", unpin=True), timeout=5)
    await managers.until(lambda a: all(not one.plan.keeps for one in a.values()), within_s=20)
