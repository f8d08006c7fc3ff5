"""The outermost layer of every RPC, around services that misbehave on request."""

import asyncio
import random
from collections.abc import AsyncIterator, Mapping, Sequence

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from structlog.testing import capture_logs

from darkroom.errors import Draining, InvalidField, MalformedMessage, QueueFull
from darkroom.runtime.server import Mounted
from darkroom.v1 import tensor_pb2, tensor_pb2_grpc, vae_pb2, vae_pb2_grpc
from darkroom.wire.status import from_rpc_error
from tests.runtime.serving import call_raw, channel_to, serving, stream_raw

DECODE = "/darkroom.v1.VaeService/Decode"
FETCH = "/darkroom.v1.TensorService/Fetch"
INTERNAL_PATH = "/home/somebody/models/secret.py"


class MoodyVae(vae_pb2_grpc.VaeServiceServicer):
    """Answers, or does what the request's id says."""

    def __init__(self) -> None:
        self.finished_count = 0

    async def Decode(self, request: vae_pb2.DecodeRequest, context: object) -> vae_pb2.DecodeResponse:
        """Decodes nothing."""
        del context
        match request.request_id:
            case "bug":
                raise KeyError(INTERNAL_PATH)
            case "full":
                raise QueueFull("64", "2")
            case "field":
                raise InvalidField("seed", "must be 0 or more, not -2")
            case "slow":
                await asyncio.sleep(0.3)
        self.finished_count += 1
        return vae_pb2.DecodeResponse()


class MoodyTensors(tensor_pb2_grpc.TensorServiceServicer):
    """Sends one chunk, and then does what the digest says."""

    async def Fetch(self, request: tensor_pb2.FetchRequest, context: object) -> AsyncIterator[tensor_pb2.FetchResponse]:
        """Streams."""
        del context
        yield tensor_pb2.FetchResponse(chunk=b"one")
        if request.digest == "bug":
            raise KeyError(INTERNAL_PATH)
        if request.digest == "full":
            raise QueueFull("64", "2")


def vae(servicer: MoodyVae) -> Mounted:
    return Mounted(
        lambda server: vae_pb2_grpc.add_VaeServiceServicer_to_server(servicer, server), "darkroom.v1.VaeService"
    )


TENSORS = Mounted(
    lambda server: tensor_pb2_grpc.add_TensorServiceServicer_to_server(MoodyTensors(), server),
    "darkroom.v1.TensorService",
)


def decode_request(mood: str) -> bytes:
    return vae_pb2.DecodeRequest(request_id=mood).SerializeToString()


def fetch_request(mood: str) -> bytes:
    return tensor_pb2.FetchRequest(digest=mood).SerializeToString()


def check_is_internal(error: grpc.aio.AioRpcError | None, logs: Sequence[Mapping[str, object]]) -> None:
    """The caller learns nothing, the log everything."""
    assert error is not None
    assert (error.code(), error.details()) == (grpc.StatusCode.UNKNOWN, "internal error")
    assert INTERNAL_PATH not in repr(error)
    assert "KeyError" not in repr(error)
    (crash,) = [entry for entry in logs if entry["event"] == "request_crashed"]
    assert crash["log_level"] == "error"
    assert isinstance(crash["exc_info"], KeyError)


async def test_a_good_request_passes() -> None:
    async with serving(vae(MoodyVae()), TENSORS) as server, channel_to(server) as channel:
        assert await call_raw(channel, DECODE, decode_request("")) is None
        assert await stream_raw(channel, FETCH, fetch_request("")) == (
            [tensor_pb2.FetchResponse(chunk=b"one").SerializeToString()],
            None,
        )


async def test_a_bug_is_unknown_to_the_caller_and_whole_in_the_log() -> None:
    async with serving(vae(MoodyVae())) as server, channel_to(server) as channel:
        with capture_logs() as logs:
            error = await call_raw(channel, DECODE, decode_request("bug"))
        check_is_internal(error, logs)
        assert await call_raw(channel, DECODE, decode_request("")) is None


async def test_a_bug_in_the_middle_of_a_stream_is_unknown_to_the_caller_and_whole_in_the_log() -> None:
    async with serving(TENSORS) as server, channel_to(server) as channel:
        with capture_logs() as logs:
            came, error = await stream_raw(channel, FETCH, fetch_request("bug"))
        assert len(came) == 1
        check_is_internal(error, logs)


async def test_an_error_of_ours_arrives_with_its_details() -> None:
    async with serving(vae(MoodyVae()), TENSORS) as server, channel_to(server) as channel:
        for error in (
            await call_raw(channel, DECODE, decode_request("full")),
            (await stream_raw(channel, FETCH, fetch_request("full")))[1],
        ):
            assert error is not None
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert isinstance(from_rpc_error(error, "vae"), QueueFull)
            status = rpc_status.from_call(error)  # type: ignore[arg-type]  # the stubs know no aio
            assert status is not None
            retry = error_details_pb2.RetryInfo()
            assert any(detail.Unpack(retry) for detail in status.details)
            assert retry.retry_delay.ToSeconds() == 2


async def test_a_wrong_field_is_named() -> None:
    async with serving(vae(MoodyVae())) as server, channel_to(server) as channel:
        error = await call_raw(channel, DECODE, decode_request("field"))
    assert error is not None
    assert (error.code(), error.details()) == (grpc.StatusCode.INVALID_ARGUMENT, "seed must be 0 or more, not -2")


@pytest.mark.parametrize(
    "raw",
    [b"\xff", b"\x0a\x7f", b"\x0a\xff\xff\xff\xff\x0f", b"\x0a\x01\xff", b"\x0a\x03\xed\xa0\x80", b"\x1b" * 1000],
    ids=["tag", "short", "length", "not UTF-8", "lone surrogate", "groups"],
)
async def test_bytes_that_are_no_message_are_refused(raw: bytes) -> None:
    async with serving(vae(MoodyVae())) as server, channel_to(server) as channel:
        error = await call_raw(channel, DECODE, raw)
    assert error is not None
    assert (error.code(), error.details()) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "the bytes received are no DecodeRequest",
    )
    assert isinstance(from_rpc_error(error, "vae"), MalformedMessage)


async def test_random_bytes_never_pass_for_a_bug() -> None:
    source = random.Random(0)
    async with serving(vae(MoodyVae()), TENSORS) as server, channel_to(server) as channel:
        for _ in range(100):
            raw = source.randbytes(source.randrange(1, 64))
            for error in (await call_raw(channel, DECODE, raw), (await stream_raw(channel, FETCH, raw))[1]):
                assert error is None or error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert await call_raw(channel, DECODE, decode_request("")) is None


async def test_a_message_over_the_limit_is_refused_and_the_next_one_served() -> None:
    async with serving(vae(MoodyVae())) as server, channel_to(server) as channel:
        error = await call_raw(channel, DECODE, b"\x1a" + bytes(2 << 20))
        assert error is not None
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert await call_raw(channel, DECODE, decode_request("")) is None


async def test_a_draining_server_refuses_new_requests_by_reason_and_still_hands_out_tensors() -> None:
    answers: list[object] = []
    async with serving(vae(MoodyVae()), TENSORS) as server, channel_to(server) as channel:
        await call_raw(channel, DECODE, decode_request(""))

        async def ask() -> None:
            answers.append(await call_raw(channel, DECODE, decode_request("")))
            answers.append((await stream_raw(channel, FETCH, fetch_request("")))[1])

        await server.drain([ask])
    refused, fetched = answers
    assert isinstance(refused, grpc.aio.AioRpcError)
    assert refused.code() is grpc.StatusCode.UNAVAILABLE
    error = from_rpc_error(refused, "vae")
    assert isinstance(error, Draining)
    assert error.facts == {"replica_id": "vae-1"}
    assert fetched is None


async def test_a_draining_server_finishes_what_it_has() -> None:
    servicer = MoodyVae()
    async with serving(vae(servicer)) as server, channel_to(server) as channel:
        slow = asyncio.create_task(call_raw(channel, DECODE, decode_request("slow")))
        await asyncio.sleep(0.1)
        assert servicer.finished_count == 0
        await server.drain()
        assert await slow is None
        assert servicer.finished_count == 1


async def test_draining_ends_after_its_time_whatever_still_runs() -> None:
    servicer = MoodyVae()
    async with serving(vae(servicer), drain_s=0.05) as server, channel_to(server) as channel:
        slow = asyncio.create_task(call_raw(channel, DECODE, decode_request("slow")))
        await asyncio.sleep(0.1)
        await server.drain()
        error = await slow
        assert error is not None
        assert error.code() in (grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE)
        assert servicer.finished_count == 0
