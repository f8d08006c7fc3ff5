"""Hostile tensors, messages and metadata at every port, the internal ones too."""

import random
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
import pytest_asyncio

from darkroom.client import Client, Drawing
from darkroom.runtime.cluster import LocalCluster
from darkroom.v1 import lora_pb2, stage_pb2, tensor_pb2
from tests.e2e.ports import (
    AT_ONCE_S,
    EMBEDDING,
    FLOAT32,
    INVALID,
    MODEL,
    NANS,
    SERVICES,
    Ports,
    decode_request,
    denoise_request,
    named,
    open_ports,
    tensor,
)

pytestmark = pytest.mark.asyncio(loop_scope="session")


@pytest_asyncio.fixture(loop_scope="session")
async def ports(cluster: LocalCluster, client: Client) -> AsyncIterator[Ports]:
    """Every port of the cluster."""
    opened = await open_ports(cluster, client)
    yield opened
    await opened.close()


BAD_TENSORS = {
    "too few bytes": tensor([1, 4, 16, 16], bytes(4095)),
    "too many bytes": tensor([1, 4, 16, 16], bytes(4097)),
    "negative extent": tensor([-1, 4, 16, 16], bytes(4096)),
    "extent of zero": tensor([0], b""),
    "huge extent": tensor([1 << 62, 1 << 62], b""),
    "terabytes": tensor([1 << 20, 1 << 20], b""),
    "nine dimensions": tensor([1] * 9, bytes(4)),
    "no type": tensor([1, 4, 16, 16], bytes(4096), 0),
    "unknown type": tensor([1, 4, 16, 16], bytes(4096), 99),
    "no content": tensor_pb2.Tensor(element_type=FLOAT32, shape=[1]),
    "not a number": tensor([1, 4, 16, 16], NANS * 1024),
    "another shape": tensor([4096], bytes(16384)),
    "scalar": tensor([], bytes(4)),
    "bytes": tensor([1, 4, 16, 16], bytes(1024), tensor_pb2.ELEMENT_TYPE_UINT8),
    "bad digest": tensor_pb2.Tensor(
        element_type=FLOAT32, shape=[1], ref=tensor_pb2.TensorRef(digest="../../etc/passwd")
    ),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
async def test_a_bad_tensor_is_refused_by_name(ports: Ports, case: str) -> None:
    answer = await ports.send("vae", "VaeService/Decode", decode_request(latents=BAD_TENSORS[case]))
    answer.check_refused(INVALID, "INVALID_TENSOR", "latents")
    raw = denoise_request(named("prompt_embeds", BAD_TENSORS[case]))
    answer = await ports.send("denoiser", "DenoiserService/Denoise", raw)
    answer.check_refused(INVALID, "INVALID_TENSOR", "prompt_embeds")


BAD_EMBEDDINGS = {
    "wrong width": ([named("prompt_embeds", tensor([1, 8, 7], bytes(224)))], "prompt_embeds"),
    "unknown name": ([named("prompt_embeds", EMBEDDING), named("lyrics", EMBEDDING)], "lyrics"),
    "given twice": ([named("prompt_embeds", EMBEDDING)] * 2, "prompt_embeds"),
    "missing": ([named("negative_prompt_embeds", EMBEDDING)], "prompt_embeds"),
}


@pytest.mark.parametrize("case", BAD_EMBEDDINGS)
async def test_bad_embeddings_are_refused_by_name(ports: Ports, case: str) -> None:
    embeddings, name = BAD_EMBEDDINGS[case]
    answer = await ports.send("denoiser", "DenoiserService/Denoise", denoise_request(*embeddings))
    answer.check_refused(INVALID, "INVALID_TENSOR", name)


@pytest.mark.parametrize("address", ["169.254.169.254:80", "127.0.0.1:22", "file:///etc/passwd", "", "x" * 10_000])
async def test_a_ref_to_a_stranger_is_not_followed(ports: Ports, address: str) -> None:
    ref = tensor_pb2.TensorRef(digest="0" * 64, holder_address=address)
    latents = tensor_pb2.Tensor(element_type=FLOAT32, shape=[1, 4, 16, 16], ref=ref)
    answer = await ports.send("vae", "VaeService/Decode", decode_request(latents=latents))
    answer.check_refused(INVALID, "UNKNOWN_HOLDER", "latents")


async def test_a_tensor_that_nobody_holds_is_not_found(ports: Ports) -> None:
    for digest in ("0" * 64, "", "../../etc/passwd", "x" * 100_000):
        raw = tensor_pb2.FetchRequest(digest=digest).SerializeToString()
        for stage in ("encoder", "denoiser", "vae"):
            answer = await ports.send(stage, "TensorService/Fetch", raw)
            assert answer.error is not None
            assert answer.error.code() is grpc.StatusCode.NOT_FOUND
            assert answer.after_s < AT_ONCE_S


@pytest.mark.parametrize("service", SERVICES)
async def test_random_bytes_never_crash_a_service(ports: Ports, service: str) -> None:
    source = random.Random(service)
    module, name = SERVICES[service]
    for method in module.DESCRIPTOR.services_by_name[name].methods_by_name:
        for _ in range(25):
            answer = await ports.send(service, f"{name}/{method}", source.randbytes(source.randrange(200)))
            assert answer.error is None or answer.error.code() in (INVALID, grpc.StatusCode.NOT_FOUND), answer.error
            assert answer.after_s < AT_ONCE_S


@pytest.mark.parametrize("stage", ["encoder", "denoiser", "vae"])
async def test_hints_are_refused_as_requests_are(ports: Ports, stage: str) -> None:
    source, method = random.Random(stage), "StageService/Prepare"
    for _ in range(25):
        answer = await ports.send(stage, method, source.randbytes(source.randrange(200)))
        assert answer.error is not None
        assert answer.error.code() in (INVALID, grpc.StatusCode.NOT_FOUND), answer.error
        assert answer.after_s < AT_ONCE_S
    unknown = stage_pb2.PrepareRequest(model_id="nowhere").SerializeToString()
    answer = await ports.send(stage, method, unknown)
    answer.check_refused(grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND", "nowhere")
    loras = [lora_pb2.Lora(lora_id="../../etc/passwd")]
    answer = await ports.send(stage, method, stage_pb2.PrepareRequest(model_id=MODEL, loras=loras).SerializeToString())
    answer.check_refused(INVALID, "INVALID_FIELD", "loras[0].lora_id")


@pytest.mark.parametrize("service", SERVICES)
async def test_a_message_over_the_limit_is_refused(ports: Ports, service: str) -> None:
    module, name = SERVICES[service]
    method = next(iter(module.DESCRIPTOR.services_by_name[name].methods_by_name))
    answer = await ports.send(service, f"{name}/{method}", b"\x0a" + bytes(33 << 20))
    assert answer.error is not None
    assert answer.error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("service", SERVICES)
async def test_metadata_of_64_kib_is_refused(ports: Ports, service: str) -> None:
    module, name = SERVICES[service]
    method = next(iter(module.DESCRIPTOR.services_by_name[name].methods_by_name))
    metadata = (("x-large", "x" * (64 << 10)),)
    answer = await ports.send(service, f"{name}/{method}", b"", metadata=metadata)
    assert answer.error is not None
    assert answer.error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_method_that_is_not_there_is_unimplemented(ports: Ports) -> None:
    for method in ("RouterService/Delete", "../etc/passwd", "RouterService/Generate/x"):
        answer = await ports.send("router", method, b"")
        assert answer.error is not None
        assert answer.error.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_after_all_of_this_a_good_request_is_served_and_nothing_has_crashed(
    cluster: LocalCluster, client: Client
) -> None:
    drawn = await client.draw(Drawing(prompt="a ring", model_id=MODEL, step_count=2, seed=1))
    assert drawn.images[0].startswith(b"\x89PNG")
    assert [child.name for child in cluster.children if child.start_count != 1] == []
    assert [log.name for log in Path(cluster.log_folder).glob("*.log") if "request_crashed" in log.read_text()] == []
