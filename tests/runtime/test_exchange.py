"""Tensors between stages: what travels in the message, what is fetched, and what is refused."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from darkroom.errors import DigestMismatch, InvalidTensor, StageUnavailable, TensorNotFound, UnknownHolder
from darkroom.runtime.channels import Channels
from darkroom.runtime.exchange import TensorServicer, TensorShelf, TensorSource
from darkroom.runtime.processes import free_port
from darkroom.runtime.server import Mounted
from darkroom.v1 import tensor_pb2, tensor_pb2_grpc
from darkroom.wire.tensors import RawTensor, RemoteTensor, digest_of, parse_tensor
from tests.runtime.serving import serving


def tensor(size_bytes: int, fill: int = 1) -> RawTensor:
    return RawTensor("uint8", (size_bytes,), bytes([fill]) * size_bytes)


def publish(shelf: TensorShelf, raw: RawTensor) -> RemoteTensor:
    published = parse_tensor("latents", shelf.publish(raw))
    assert isinstance(published, RemoteTensor)
    return published


class LyingTensors(tensor_pb2_grpc.TensorServiceServicer):
    """Sends the same bytes for every digest, and more of them than asked for."""

    async def Fetch(self, request: tensor_pb2.FetchRequest, context: object) -> AsyncIterator[tensor_pb2.FetchResponse]:
        """Streams."""
        del request, context
        for _ in range(1000):
            yield tensor_pb2.FetchResponse(chunk=b"lies")


@asynccontextmanager
async def holder(servicer: tensor_pb2_grpc.TensorServiceServicer) -> AsyncIterator[str]:
    """The address of another replica."""
    mounted = Mounted(
        lambda server: tensor_pb2_grpc.add_TensorServiceServicer_to_server(servicer, server),
        "darkroom.v1.TensorService",
    )
    async with serving(mounted) as server:
        yield f"127.0.0.1:{server.port}"


@asynccontextmanager
async def source(*holders: str, shelf: TensorShelf | None = None) -> AsyncIterator[TensorSource]:
    """A source that knows these replicas."""
    channels = Channels()
    yield TensorSource(channels, shelf or TensorShelf(limit_bytes=1), lambda: set(holders))
    await channels.close()


def test_a_tensor_up_to_the_inline_limit_travels_by_value() -> None:
    shelf = TensorShelf(limit_bytes=100, inline_limit_bytes=10)
    assert parse_tensor("latents", shelf.publish(tensor(10))) == tensor(10)
    assert shelf.size_bytes == 0


def test_a_larger_tensor_travels_by_ref() -> None:
    shelf = TensorShelf(limit_bytes=100, inline_limit_bytes=10)
    shelf.address = "127.0.0.1:7"
    remote = publish(shelf, tensor(11))
    assert (remote.element_type, remote.shape, remote.size_bytes) == ("uint8", (11,), 11)
    assert (remote.digest, remote.holder_address) == (digest_of(tensor(11).data), "127.0.0.1:7")
    assert 290 < remote.expire_time_s - time.time() < 301
    assert shelf.get(remote.digest) == tensor(11).data
    assert shelf.size_bytes == 11


def test_equal_tensors_are_held_once() -> None:
    shelf = TensorShelf(limit_bytes=100, inline_limit_bytes=0)
    assert publish(shelf, tensor(11)).digest == publish(shelf, tensor(11)).digest
    assert shelf.size_bytes == 11


def test_the_oldest_tensors_make_room() -> None:
    shelf = TensorShelf(limit_bytes=25, inline_limit_bytes=0)
    digests = [publish(shelf, tensor(10, fill)).digest for fill in range(3)]
    assert shelf.size_bytes == 20
    with pytest.raises(TensorNotFound):
        shelf.get(digests[0])
    assert shelf.get(digests[1])
    assert shelf.get(digests[2])


def test_publishing_again_makes_a_tensor_young() -> None:
    shelf = TensorShelf(limit_bytes=25, inline_limit_bytes=0)
    first, second = publish(shelf, tensor(10, 0)), publish(shelf, tensor(10, 1))
    publish(shelf, tensor(10, 0))
    publish(shelf, tensor(10, 2))
    assert shelf.get(first.digest)
    with pytest.raises(TensorNotFound):
        shelf.get(second.digest)


def test_a_tensor_larger_than_the_bound_is_held_until_the_next() -> None:
    shelf = TensorShelf(limit_bytes=5, inline_limit_bytes=0)
    large = publish(shelf, tensor(10))
    assert shelf.get(large.digest) == tensor(10).data
    publish(shelf, tensor(2))
    with pytest.raises(TensorNotFound):
        shelf.get(large.digest)
    assert shelf.size_bytes == 2


async def test_a_tensor_expires_and_then_makes_room() -> None:
    shelf = TensorShelf(limit_bytes=100, inline_limit_bytes=0, lifetime_s=0.05)
    remote = publish(shelf, tensor(10))
    assert shelf.get(remote.digest)
    await asyncio.sleep(0.06)
    with pytest.raises(TensorNotFound):
        shelf.get(remote.digest)
    publish(shelf, tensor(3))
    assert shelf.size_bytes == 3


async def test_a_tensor_by_value_is_taken_as_it_is() -> None:
    async with source() as reader:
        assert await reader.bring("latents", tensor(4)) == tensor(4)


async def test_a_tensor_of_ones_own_needs_no_call() -> None:
    shelf = TensorShelf(limit_bytes=100, inline_limit_bytes=0)
    shelf.address = "127.0.0.1:1"
    async with source(shelf=shelf) as reader:
        assert await reader.bring("latents", publish(shelf, tensor(4))) == tensor(4)


async def test_a_tensor_of_another_replica_is_fetched_in_chunks() -> None:
    shelf = TensorShelf(limit_bytes=10 << 20, inline_limit_bytes=0)
    large = tensor((5 << 20) // 2)
    async with holder(TensorServicer(shelf)) as address, source(address) as reader:
        shelf.address = address
        remotes = {"a": publish(shelf, large), "b": publish(shelf, tensor(3))}
        assert await reader.bring_all(remotes) == {"a": large, "b": tensor(3)}


async def test_an_address_outside_the_cluster_is_never_called() -> None:
    calls: list[None] = []

    async def accept(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        calls.append(None)
        writer.close()

    stranger = await asyncio.start_server(accept, "127.0.0.1", 0)
    address = f"127.0.0.1:{stranger.sockets[0].getsockname()[1]}"
    remote = RemoteTensor("uint8", (4,), digest_of(b""), address, time.time() + 60)
    async with stranger, source("127.0.0.1:1") as reader:
        with pytest.raises(UnknownHolder) as caught:
            await reader.bring("latents", remote)
        await asyncio.sleep(0.05)
    assert caught.value.facts == {"tensor": "latents"}
    assert not calls


async def test_other_bytes_than_the_digest_says_are_refused() -> None:
    async with holder(LyingTensors()) as address, source(address) as reader:
        with pytest.raises(DigestMismatch):
            await reader.bring("latents", RemoteTensor("uint8", (4000,), digest_of(b"truth"), address, 0.0))


async def test_more_bytes_than_the_shape_says_are_refused_before_they_are_all_here() -> None:
    async with holder(LyingTensors()) as address, source(address) as reader:
        with pytest.raises(InvalidTensor, match="larger where it is held"):
            await reader.bring("latents", RemoteTensor("uint8", (10,), digest_of(b"lies" * 1000), address, 0.0))


@pytest.mark.parametrize("is_own", [True, False])
async def test_fewer_bytes_than_the_shape_says_are_refused(*, is_own: bool) -> None:
    shelf = TensorShelf(limit_bytes=100, inline_limit_bytes=0)
    async with holder(TensorServicer(shelf)) as address:
        shelf.address = address
        remote = replace(publish(shelf, tensor(10)), shape=(11,))
        async with source(address, shelf=shelf if is_own else None) as reader:
            with pytest.raises(InvalidTensor, match="has 10 bytes where its shape and type ask for 11"):
                await reader.bring("latents", remote)


async def test_a_tensor_that_is_gone_is_not_found() -> None:
    shelf = TensorShelf(limit_bytes=100, inline_limit_bytes=0)
    async with holder(TensorServicer(shelf)) as address, source(address) as reader:
        with pytest.raises(TensorNotFound):
            await reader.bring("latents", RemoteTensor("uint8", (4,), digest_of(b"gone"), address, 0.0))


async def test_a_holder_that_is_down_is_unavailable() -> None:
    address = f"127.0.0.1:{free_port()}"
    async with source(address) as reader:
        with pytest.raises(StageUnavailable) as caught:
            await reader.bring("latents", RemoteTensor("uint8", (4,), digest_of(b""), address, 0.0))
    assert caught.value.facts["stage"] == "tensor"
