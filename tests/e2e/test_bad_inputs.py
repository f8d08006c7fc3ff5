"""Hostile requests: a clear error that names what is wrong, at once, and nobody else is harmed."""

import asyncio
import math
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio

from darkroom.client import Client, Drawing
from darkroom.runtime.cluster import LocalCluster
from darkroom.v1 import (
    cachemgr_pb2,
    graph_pb2,
    stage_pb2,
)
from darkroom.wire.fields import MAX_PROMPT_CHARACTERS
from tests.e2e.ports import (
    AT_ONCE_S,
    INVALID,
    MODEL,
    SIZE_PX,
    Ports,
    decode_request,
    denoise_request,
    encode_request,
    generate_request,
    graph_request,
    open_ports,
)

pytestmark = pytest.mark.asyncio(loop_scope="session")

BAD_MODEL_IDS = {
    "parent": "../shapes", "encoded parent": "..%2fshapes", "absolute": "/etc/passwd", "file": "file:///etc/passwd",
    "NUL": "shapes\0", "full width": "\uff0e\uff0e/shapes", "4 KB": "a" * 4096, "URL": "http://169.254.169.254/x",
    "upper case": "SHAPES", "space": "tiny sd",
}  # fmt: skip


@pytest_asyncio.fixture(loop_scope="session")
async def ports(cluster: LocalCluster, client: Client) -> AsyncIterator[Ports]:
    """Every port of the cluster."""
    opened = await open_ports(cluster, client)
    yield opened
    await opened.close()


BAD_PROMPTS = {
    "missing": {"prompt": ""},
    "spaces": {"prompt": " \t\r\n\u2003"},
    "too long": {"prompt": "x" * (MAX_PROMPT_CHARACTERS + 1)},
    "NUL": {"prompt": "a\0b"},
    "combining marks": {"prompt": "e" + "\u0301" * 100_000},
    "2 MB": {"prompt": "x" * (2 << 20)},
}


@pytest.mark.parametrize("case", BAD_PROMPTS)
async def test_a_bad_prompt_is_refused(ports: Ports, case: str) -> None:
    answer = await ports.send("router", "RouterService/Generate", generate_request(**BAD_PROMPTS[case]))
    answer.check_refused(INVALID, "INVALID_FIELD", "prompt")
    answer = await ports.send("encoder", "EncoderService/Encode", encode_request(**BAD_PROMPTS[case]))
    answer.check_refused(INVALID, "INVALID_FIELD", "prompt")


async def test_a_bad_negative_prompt_is_refused(ports: Ports) -> None:
    for value in ("x" * (MAX_PROMPT_CHARACTERS + 1), "\0"):
        answer = await ports.send("router", "RouterService/Generate", generate_request(negative_prompt=value))
        answer.check_refused(INVALID, "INVALID_FIELD", "negative_prompt")


async def test_a_lone_surrogate_is_no_message(ports: Ports) -> None:
    answer = await ports.send("router", "RouterService/Generate", b"\x1a\x03\xed\xa0\x80")
    answer.check_refused(INVALID, "MALFORMED_MESSAGE", "GenerateRequest")


@pytest.mark.parametrize(
    "prompt",
    [
        "<|startoftext|><|endoftext|>", "{{7*7}}", "%s%n%x", "a ring\r\nx: y", "<script>alert(1)</script>", "🜁 é 輪",
        "'; DROP TABLE models; --", "x " * 15_000,
    ],
)  # fmt: skip
async def test_a_strange_prompt_is_drawn(client: Client, prompt: str) -> None:
    drawn = await client.draw(Drawing(prompt=prompt, model_id=MODEL, step_count=1))
    assert drawn.images[0].startswith(b"\x89PNG")


BAD_NUMBERS: list[tuple[str, Any]] = [
    ("image_count", 0), ("image_count", -1), ("image_count", 11), ("image_count", (1 << 31) - 1),
    ("width_px", 0), ("width_px", 513), ("width_px", 99999), ("width_px", -64), ("height_px", 0), ("height_px", 513),
    ("height_px", 65536), ("step_count", 0), ("step_count", -1), ("step_count", 1001),
    ("guidance_scale", math.nan), ("guidance_scale", math.inf), ("guidance_scale", -1.0), ("guidance_scale", 1e308),
    ("seed", -2), ("seed", -(1 << 63)), ("scheduler", "fastest"), ("scheduler", "flow_euler"),
    ("scheduler", "x" * 100_000), ("request_id", "a b"), ("request_id", "x" * 65), ("request_id", "a\r\nb"),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), BAD_NUMBERS, ids=lambda value: str(value)[:24])
async def test_a_bad_number_is_refused_by_field(ports: Ports, field: str, value: Any) -> None:
    answer = await ports.send("router", "RouterService/Generate", generate_request(**{field: value}))
    answer.check_refused(INVALID, "INVALID_FIELD", field)


async def test_an_unknown_scheduler_is_told_the_known_ones(ports: Ports) -> None:
    answer = await ports.send("router", "RouterService/Generate", generate_request(scheduler="fastest"))
    answer.check_refused(INVALID, "INVALID_FIELD", "ddim", "euler_a", "unipc", "dpmpp_2m")


async def test_a_size_is_refused_where_only_one_side_is_wrong(ports: Ports) -> None:
    answer = await ports.send("router", "RouterService/Generate", generate_request(width_px=64, height_px=65536))
    answer.check_refused(INVALID, "INVALID_FIELD", "height_px")


async def test_a_deadline_that_has_passed_is_a_deadline_exceeded(ports: Ports) -> None:
    for timeout_s in (0.0, 1e-6):
        answer = await ports.send("router", "RouterService/Generate", generate_request(), timeout_s=timeout_s)
        assert answer.error is not None
        assert answer.error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert answer.after_s < AT_ONCE_S


@pytest.mark.parametrize("case", BAD_MODEL_IDS)
async def test_a_bad_model_id_is_refused_at_every_port(ports: Ports, case: str) -> None:
    model_id = BAD_MODEL_IDS[case]
    locate = cachemgr_pb2.LocateRequest(model_id=model_id, stage=stage_pb2.STAGE_VAE).SerializeToString()
    for service, method, raw in (
        ("router", "RouterService/Generate", generate_request(model_id=model_id)),
        ("encoder", "EncoderService/Encode", encode_request(model_id=model_id)),
        ("denoiser", "DenoiserService/Denoise", denoise_request(model_id=model_id)),
        ("vae", "VaeService/Decode", decode_request(model_id=model_id)),
        ("cachemgr", "CacheManagerService/Locate", locate),
    ):
        (await ports.send(service, method, raw)).check_refused(INVALID, "INVALID_FIELD", "model_id")
    answer = await ports.send("router", "RouterService/RunGraph", graph_request([text("n", model_id)]))
    answer.check_refused(INVALID, "INVALID_GRAPH", "'n'", "model_id")


async def test_an_unknown_model_is_not_found_at_every_port(ports: Ports) -> None:
    locate = cachemgr_pb2.LocateRequest(model_id="nowhere", stage=stage_pb2.STAGE_VAE).SerializeToString()
    for service, method, raw in (
        ("router", "RouterService/Generate", generate_request(model_id="nowhere")),
        ("router", "RouterService/RunGraph", graph_request([text("n", "nowhere")])),
        ("encoder", "EncoderService/Encode", encode_request(model_id="nowhere")),
        ("denoiser", "DenoiserService/Denoise", denoise_request(model_id="nowhere")),
        ("vae", "VaeService/Decode", decode_request(model_id="nowhere")),
        ("cachemgr", "CacheManagerService/Locate", locate),
    ):
        answer = await ports.send(service, method, raw)
        answer.check_refused(grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND", "model_id", "nowhere")


async def test_a_stage_that_holds_no_models_cannot_be_asked_for(ports: Ports) -> None:
    for stage in (0, 99):
        request = cachemgr_pb2.LocateRequest(model_id=MODEL)
        request.stage = stage  # type: ignore[assignment]  # what another version may send
        answer = await ports.send("cachemgr", "CacheManagerService/Locate", request.SerializeToString())
        answer.check_refused(INVALID, "INVALID_FIELD", "stage")


def text(node_id: str, model_id: str = MODEL) -> graph_pb2.Node:
    return graph_pb2.Node(id=node_id, encode_text=graph_pb2.EncodeText(model_id=model_id, prompt="x"))


def draw(node_id: str, **changes: Any) -> graph_pb2.Node:
    good = {"model_id": MODEL, "width_px": SIZE_PX, "height_px": SIZE_PX, "step_count": 1, "image_count": 1}
    return graph_pb2.Node(id=node_id, denoise=graph_pb2.Denoise(**{**good, **changes}))


def out(node_id: str, model_id: str = MODEL) -> graph_pb2.Node:
    return graph_pb2.Node(id=node_id, decode=graph_pb2.Decode(model_id=model_id))


BAD_GRAPHS = {
    "no nodes": (graph_request([]), ""),
    "no work": (graph_request([graph_pb2.Node(id="idle")]), "'idle'"),
    "bad id": (graph_request([text("A B")]), "'A B'"),
    "given twice": (graph_request([text("a"), text("a")]), "'a'"),
    "missing port": (graph_request([draw("d")]), "'d'"),
    "doubly filled": (
        graph_request(
            [text("a"), text("b"), draw("d")],
            ("a", "embedding", "d", "embedding"),
            ("b", "embedding", "d", "embedding"),
        ),
        "'d'",
    ),
    "unknown node": (graph_request([text("a")], ("a", "embedding", "ghost", "embedding")), "'ghost'"),
    "kind mismatch": (graph_request([text("a"), out("o")], ("a", "embedding", "o", "latent")), "'o'"),
    "itself": (graph_request([draw("d")], ("d", "latent", "d", "embedding")), "'d'"),
    "cycle": (
        graph_request([draw("d"), draw("e")], ("d", "latent", "e", "embedding"), ("e", "latent", "d", "embedding")),
        "'e'",
    ),
    "foreign latents": (
        graph_request(
            [text("a"), draw("d"), out("o", "tiny-sdxl")],
            ("a", "embedding", "d", "embedding"),
            ("d", "latent", "o", "latent"),
        ),
        "'o'",
    ),
    "10,000 nodes": (graph_request([text(f"n{number}") for number in range(10_000)]), "10000 nodes"),
    "bad size": (
        graph_request([text("a"), draw("d", width_px=99999)], ("a", "embedding", "d", "embedding")),
        "width_px",
    ),
    "size that does not fit": (
        graph_request([text("a"), draw("d", width_px=33)], ("a", "embedding", "d", "embedding")),
        "width_px",
    ),
}


@pytest.mark.parametrize("case", BAD_GRAPHS)
async def test_a_bad_graph_is_refused_by_node(ports: Ports, case: str) -> None:
    raw, node = BAD_GRAPHS[case]
    (await ports.send("router", "RouterService/RunGraph", raw)).check_refused(INVALID, "INVALID_GRAPH", node)


async def test_a_thousand_bad_requests_at_once_do_not_delay_a_good_one(ports: Ports, client: Client) -> None:
    bad = [ports.send("router", "RouterService/Generate", generate_request(prompt="\0")) for _ in range(1000)]
    flood = asyncio.gather(*bad)
    drawn = await asyncio.wait_for(client.draw(Drawing(prompt="a ring", model_id=MODEL, step_count=1)), timeout=20.0)
    assert drawn.images
    assert all(answer.error and answer.error.code() is INVALID for answer in await flood)


async def test_after_all_of_this_a_good_request_is_served_and_nothing_has_crashed(
    cluster: LocalCluster, client: Client
) -> None:
    drawn = await client.draw(Drawing(prompt="a ring", model_id=MODEL, step_count=2, seed=1))
    assert drawn.images[0].startswith(b"\x89PNG")
    assert [child.name for child in cluster.children if child.start_count != 1] == []
    assert [log.name for log in Path(cluster.log_folder).glob("*.log") if "request_crashed" in log.read_text()] == []
