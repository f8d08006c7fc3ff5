"""LoRAs at the encoder: one that does not change the encoding costs it nothing, by what its file's header says."""

import asyncio
import shutil
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from darkroom.errors import DarkroomError, InvalidField, LoraNotFound
from darkroom.models.lora_file import changes_text
from darkroom.models.store.model_store import ModelStore
from darkroom.v1 import encoder_pb2, encoder_pb2_grpc, lora_pb2
from darkroom.wire.status import from_rpc_error
from tests.services.neighbours import MODEL, Neighbours, RunningStage, eventually, failure_of
from tests.services.test_encoder import encode, encode_request
from tests.tiny_loras import diffusers_names, factors, is_any, is_attention, kohya_names, save_lora

PATHS = {"ink": "unet", "kohya": "unet", "voice": "text_encoder", "kohya-voice": "text_encoder"}


@pytest.fixture
async def neighbours(tiny_store: Path, tmp_path: Path) -> AsyncIterator[Neighbours]:
    """Over a model with LoRAs for its UNet, and for its text encoder."""
    shutil.copytree(tiny_store / MODEL, tmp_path / MODEL)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / MODEL)
    for seed, (lora_id, network) in enumerate(PATHS.items()):
        pairs = factors(getattr(pipeline, network), is_any if network == "unet" else is_attention, rank=4, seed=seed)
        is_kohya = lora_id.startswith("kohya")
        tensors = kohya_names(network, pairs, alpha=2.0) if is_kohya else diffusers_names(network, pairs)
        save_lora(tmp_path, lora_id, tensors, base_model=MODEL)
    async with Neighbours(tmp_path) as started:
        yield started


def with_loras(*lora_ids: str) -> encoder_pb2.EncodeRequest:
    request = encode_request(deterministic=True)
    request.loras.extend(lora_pb2.Lora(lora_id=lora_id, scale=0.5) for lora_id in lora_ids)
    return request


async def held(stage: RunningStage) -> set[str]:
    """The LoRAs that the encoder has read."""
    adapters = (await stage.replica.part(MODEL)).beside.get("loras")
    return set(adapters.resident()) if adapters else set()


@pytest.mark.parametrize("lora_id", ["ink", "kohya"])
async def test_a_lora_of_the_denoiser_alone_is_not_waited_for_and_shares_the_embedding(
    neighbours: Neighbours, lora_id: str
) -> None:
    encoder = await neighbours.stage("encoder")
    plain = await encode(encoder, with_loras())
    answer = await encode(encoder, with_loras(lora_id))
    assert answer.cached
    assert answer.embeddings == plain.embeddings
    assert await held(encoder) == set()


@pytest.mark.parametrize("lora_ids", [("voice",), ("kohya-voice",), ("ink", "voice")])
async def test_one_that_changes_the_text_encoder_changes_the_embedding(
    neighbours: Neighbours, lora_ids: tuple[str, ...]
) -> None:
    encoder = await neighbours.stage("encoder")
    plain = await encode(encoder, with_loras())
    answer = await encode(encoder, with_loras(*lora_ids))
    assert not answer.cached
    first, second = [
        torch.frombuffer(bytearray(each.embeddings[0].tensor.data), dtype=torch.float32) for each in (plain, answer)
    ]
    assert (first - second).abs().max() > 1e-3
    assert await held(encoder) == set(lora_ids) - {"ink"}, "of which it has no part"


@pytest.mark.parametrize(("second", "kind"), [("none", LoraNotFound), ("ink", InvalidField)], ids=["unknown", "again"])
async def test_one_that_cannot_be_is_named_by_its_position(
    neighbours: Neighbours, second: str, kind: type[DarkroomError]
) -> None:
    encoder = await neighbours.stage("encoder")
    call = encoder_pb2_grpc.EncoderServiceStub(encoder.channel).Encode(with_loras("ink", second), timeout=20.0)
    error = from_rpc_error(await failure_of(call), "encoder")
    assert isinstance(error, kind)
    assert "loras[1]" in error.message


async def test_a_store_that_does_not_answer_keeps_up_only_those_that_need_it_and_is_asked_once(
    neighbours: Neighbours, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = await neighbours.stage("encoder")
    await encode(encoder, with_loras("ink"))
    may_answer, asked = threading.Event(), list[str]()

    def hang(store: ModelStore, lora_id: str) -> bool:
        asked.append(lora_id)
        may_answer.wait(20)
        return changes_text(store, lora_id)

    monkeypatch.setattr("services.encoder.text_loras.changes_text", hang)
    waiting = [asyncio.create_task(encode(encoder, with_loras("kohya"))) for _ in range(12)]
    await eventually(lambda: encoder.running_count == 12)
    assert (await encode(encoder, with_loras("ink"))).cached
    may_answer.set()
    assert len(await asyncio.gather(*waiting)) == 12
    assert asked == ["kohya"]
