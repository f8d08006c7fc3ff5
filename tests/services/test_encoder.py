"""The encoder over gRPC: each prompt is encoded once, for as long as somebody wants it."""

import asyncio

import grpc
import pytest

from darkroom.errors import Draining, QueueFull
from darkroom.models import programs
from darkroom.models.program import Ticket
from darkroom.models.tensors import to_raw
from darkroom.v1 import encoder_pb2, encoder_pb2_grpc
from darkroom.wire.status import from_rpc_error
from darkroom.wire.tasks import parse_encode
from darkroom.wire.tensors import RemoteTensor, parse_tensor
from tests.services.neighbours import MODEL, Neighbours, RunningStage, engine_held, eventually, failure_of


def encode_request(
    prompt: str = "a ring", *, guided: bool = False, deterministic: bool = False, model_id: str = MODEL
) -> encoder_pb2.EncodeRequest:
    return encoder_pb2.EncodeRequest(model_id=model_id, prompt=prompt, guided=guided, deterministic=deterministic)


async def encode(stage: RunningStage, request: encoder_pb2.EncodeRequest) -> encoder_pb2.EncodeResponse:
    answer: encoder_pb2.EncodeResponse = await encoder_pb2_grpc.EncoderServiceStub(stage.channel).Encode(
        request, timeout=20.0
    )
    return answer


async def test_a_prompt_becomes_the_embeddings_that_its_pipeline_makes(neighbours: Neighbours) -> None:
    encoder = await neighbours.stage("encoder")
    request = encode_request(guided=True, deterministic=True)
    answer = await encode(encoder, request)
    part = await encoder.replica.part(MODEL)
    expected = await encoder.replica.run(lambda: programs.encode(part, parse_encode(request)), Ticket(alone=True))
    assert {named.name: parse_tensor(named.name, named.tensor) for named in answer.embeddings} == {
        name: to_raw(value) for name, value in expected.items()
    }
    assert set(expected) == {"prompt_embeds", "negative_prompt_embeds"}


async def test_without_guidance_there_is_no_negative_embedding(neighbours: Neighbours) -> None:
    answer = await encode(await neighbours.stage("encoder"), encode_request())
    assert [named.name for named in answer.embeddings] == ["prompt_embeds"]


async def test_equal_prompts_in_flight_are_encoded_once(neighbours: Neighbours) -> None:
    encoder = await neighbours.stage("encoder")
    async with engine_held(encoder):
        calls = [asyncio.create_task(encode(encoder, encode_request())) for _ in range(5)]
        await eventually(lambda: encoder.running_count == 5)
    answers = await asyncio.gather(*calls)
    assert encoder.forward_count == 1
    assert sorted(answer.cached for answer in answers) == [False, True, True, True, True]
    assert len({answer.embeddings[0].tensor.data for answer in answers}) == 1


async def test_a_prompt_seen_before_comes_from_the_cache(neighbours: Neighbours) -> None:
    encoder = await neighbours.stage("encoder")
    first, second = [await encode(encoder, encode_request()) for _ in range(2)]
    assert (first.cached, second.cached) == (False, True)
    assert first.embeddings == second.embeddings
    assert encoder.forward_count == 1


async def test_without_a_cache_every_prompt_is_encoded(neighbours: Neighbours) -> None:
    encoder = await neighbours.stage("encoder", cache_bytes=0)
    answers = [await encode(encoder, encode_request()) for _ in range(2)]
    assert [answer.cached for answer in answers] == [False, False]
    assert encoder.forward_count == 2


async def test_deterministic_and_batched_results_are_not_mixed(neighbours: Neighbours) -> None:
    encoder = await neighbours.stage("encoder")
    for deterministic in (False, True):
        answer = await encode(encoder, encode_request(deterministic=deterministic))
        assert not answer.cached
    assert encoder.forward_count == 2


async def test_guided_and_unguided_results_are_not_mixed(neighbours: Neighbours) -> None:
    encoder = await neighbours.stage("encoder")
    await encode(encoder, encode_request())
    answer = await encode(encoder, encode_request(guided=True))
    assert not answer.cached
    assert len(answer.embeddings) == 2


async def test_a_caller_that_leaves_does_not_take_the_work_from_the_others(neighbours: Neighbours) -> None:
    encoder = await neighbours.stage("encoder")
    async with engine_held(encoder):
        leaving, staying = (asyncio.create_task(encode(encoder, encode_request())) for _ in range(2))
        await eventually(lambda: encoder.running_count == 2)
        leaving.cancel()
        await eventually(lambda: encoder.running_count == 1)
    assert (await staying).embeddings
    assert encoder.forward_count == 1


async def test_the_last_caller_to_leave_ends_the_work(neighbours: Neighbours) -> None:
    encoder = await neighbours.stage("encoder")
    async with engine_held(encoder):
        calls = [asyncio.create_task(encode(encoder, encode_request())) for _ in range(2)]
        await eventually(lambda: encoder.running_count == 2)
        for call in calls:
            call.cancel()
        await eventually(lambda: encoder.running_count == 0)
    assert encoder.forward_count == 0
    assert not (await encode(encoder, encode_request())).cached


async def test_a_caller_after_all_others_left_is_served(neighbours: Neighbours) -> None:
    encoder = await neighbours.stage("encoder")
    async with engine_held(encoder):
        leaving = asyncio.create_task(encode(encoder, encode_request()))
        await eventually(lambda: encoder.running_count == 1)
        leaving.cancel()
        await eventually(lambda: encoder.running_count == 0)
        late = asyncio.create_task(encode(encoder, encode_request()))
        await eventually(lambda: encoder.running_count == 1)
    assert (await late).embeddings


async def test_a_large_embedding_is_published_by_ref(neighbours: Neighbours) -> None:
    encoder = await neighbours.stage("encoder", inline_limit_bytes=100)
    answer = await encode(encoder, encode_request())
    tensor = parse_tensor("prompt_embeds", answer.embeddings[0].tensor)
    assert isinstance(tensor, RemoteTensor)
    assert encoder.shelf.size_bytes == tensor.size_bytes == len(encoder.shelf.get(tensor.digest))


@pytest.mark.parametrize(
    ("model_id", "code"), [("nowhere", grpc.StatusCode.NOT_FOUND), ("..", grpc.StatusCode.INVALID_ARGUMENT)]
)
async def test_a_model_that_is_not_there_is_refused(
    neighbours: Neighbours, model_id: str, code: grpc.StatusCode
) -> None:
    encoder = await neighbours.stage("encoder")
    stub = encoder_pb2_grpc.EncoderServiceStub(encoder.channel)
    error = await failure_of(stub.Encode(encode_request(model_id=model_id), timeout=20.0))
    assert error.code() is code
    assert "model_id" in str(error.details())


async def test_a_full_encoder_says_when_to_come_back(neighbours: Neighbours) -> None:
    encoder = await neighbours.stage("encoder", max_running=1)
    async with engine_held(encoder):
        first = asyncio.create_task(encode(encoder, encode_request("a")))
        await eventually(lambda: encoder.running_count == 1)
        stub = encoder_pb2_grpc.EncoderServiceStub(encoder.channel)
        refused = from_rpc_error(await failure_of(stub.Encode(encode_request("b"), timeout=20.0)), "encoder")
    assert isinstance(refused, QueueFull)
    assert refused.retry_after_s == 1.0
    assert (await first).embeddings


async def test_a_draining_encoder_finishes_what_it_has_and_refuses_the_rest(neighbours: Neighbours) -> None:
    encoder = await neighbours.stage("encoder")
    stub = encoder_pb2_grpc.EncoderServiceStub(encoder.channel)
    refused: list[object] = []

    async def ask() -> None:
        error = await failure_of(stub.Encode(encode_request("b"), timeout=20.0))
        refused.append(from_rpc_error(error, "encoder"))

    async with engine_held(encoder):
        running = asyncio.create_task(encode(encoder, encode_request("a")))
        await eventually(lambda: encoder.running_count == 1)
        draining = asyncio.create_task(encoder.server.drain([ask]))
        await eventually(lambda: bool(refused))
    assert isinstance(refused[0], Draining)
    assert (await running).embeddings
    await draining
