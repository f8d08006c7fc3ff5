"""Clients' graphs: in which order they run, and what is refused, with the node's name."""

from typing import Any

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from darkroom.errors import InvalidGraph
from darkroom.v1 import graph_pb2
from darkroom.wire.graphs import DecodeWork, DenoiseWork, EncodeTextWork, make_graph, parse_graph

Edge = tuple[str, str, str, str]
TXT2IMG: list[Edge] = [("encode", "embedding", "denoise", "embedding"), ("denoise", "latent", "decode", "latent")]


def encode(node_id: str = "encode", **changes: Any) -> graph_pb2.Node:
    return graph_pb2.Node(
        id=node_id, encode_text=graph_pb2.EncodeText(**{"model_id": "shapes", "prompt": "x", **changes})
    )


def denoise(node_id: str = "denoise", **changes: Any) -> graph_pb2.Node:
    good = {"model_id": "shapes", "width_px": 64, "height_px": 64, "step_count": 4, "image_count": 1}
    return graph_pb2.Node(id=node_id, denoise=graph_pb2.Denoise(**{**good, **changes}))


def decode(node_id: str = "decode", **changes: Any) -> graph_pb2.Node:
    return graph_pb2.Node(id=node_id, decode=graph_pb2.Decode(**{"model_id": "shapes", **changes}))


def graph(nodes: list[graph_pb2.Node], edges: list[Edge]) -> graph_pb2.Graph:
    named = [graph_pb2.Edge(from_node=a, from_port=b, to_node=c, to_port=d) for a, b, c, d in edges]
    return graph_pb2.Graph(nodes=nodes, edges=named)


def refused(message: graph_pb2.Graph, node: str) -> str:
    with pytest.raises(InvalidGraph) as caught:
        parse_graph(message)
    assert caught.value.facts["node"] == node
    return caught.value.message


def test_nodes_come_after_those_that_feed_them_in_whatever_order_they_are_given() -> None:
    parsed = parse_graph(graph([decode(), denoise(), encode()], TXT2IMG[::-1]))
    assert [node.node_id for node in parsed.nodes] == ["encode", "denoise", "decode"]
    assert [node.stage for node in parsed.nodes] == ["encoder", "denoiser", "vae"]
    assert [node.sources for node in parsed.nodes] == [{}, {"embedding": "encode"}, {"latent": "denoise"}]


def test_work_is_read_field_by_field() -> None:
    nodes = [
        encode(negative_prompt="red", guided=True),
        denoise(width_px=32, height_px=48, step_count=9, guidance_scale=3.5, seed=5, image_count=2, scheduler="ddim"),
        decode(parameters={"k": "v"}),
    ]
    works = [node.work for node in parse_graph(graph(nodes, TXT2IMG)).nodes]
    assert works == [
        EncodeTextWork(model_id="shapes", prompt="x", negative_prompt="red", guided=True),
        DenoiseWork(
            model_id="shapes", width_px=32, height_px=48, step_count=9, guidance_scale=3.5, seed=5, image_count=2,
            scheduler="ddim",
        ),
        DecodeWork(model_id="shapes", parameters={"k": "v"}),
    ]  # fmt: skip


def test_an_output_may_feed_several_nodes_and_a_graph_may_have_several_ends() -> None:
    edges = [*TXT2IMG, ("encode", "embedding", "second", "embedding"), ("second", "latent", "other", "latent")]
    parsed = parse_graph(graph([encode(), denoise(), denoise("second"), decode(), decode("other")], edges))
    assert len(parsed.nodes) == 5


def test_sixty_four_nodes_are_allowed() -> None:
    assert len(parse_graph(graph([encode(f"n{i}") for i in range(64)], [])).nodes) == 64


@pytest.mark.parametrize("count", [0, 65, 10_000])
def test_no_nodes_or_too_many_are_refused(count: int) -> None:
    refused(graph([encode(f"n{i}") for i in range(count)], []), "")


def test_a_repeated_id_is_refused() -> None:
    assert "more than once" in refused(graph([encode("a"), encode("b"), encode("b")], []), "b")


@pytest.mark.parametrize("node_id", ["", "A", "a b", "a\n", "é", "../a"])
def test_a_bad_id_is_refused(node_id: str) -> None:
    refused(graph([encode(node_id)], []), node_id)


def test_a_long_id_is_refused_and_cut() -> None:
    refused(graph([encode("a" * 5000)], []), "a" * 64)


def test_a_node_without_work_is_refused() -> None:
    assert "no work" in refused(graph([graph_pb2.Node(id="idle")], []), "idle")


@pytest.mark.parametrize(
    ("node", "field"),
    [
        (encode("n", model_id="../x"), "model_id"), (encode("n", prompt=" "), "prompt"),
        (encode("n", negative_prompt="\0"), "negative_prompt"), (denoise("n", model_id=""), "model_id"),
        (denoise("n", width_px=0), "width_px"), (denoise("n", height_px=99999), "height_px"),
        (denoise("n", step_count=1001), "step_count"), (denoise("n", guidance_scale=-1), "guidance_scale"),
        (denoise("n", seed=-1), "seed"), (denoise("n", image_count=0), "image_count"),
        (decode("n", model_id="file:x"), "model_id"), (decode("n", parameters={"": ""}), "parameters"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_refused_with_node_and_field(node: graph_pb2.Node, field: str) -> None:
    assert field in refused(graph([node], []), "n")


def test_an_empty_port_is_refused() -> None:
    assert "nothing on its input port 'embedding'" in refused(
        graph([encode(), denoise(), decode()], TXT2IMG[1:]), "denoise"
    )


def test_a_port_filled_twice_is_refused() -> None:
    edges = [*TXT2IMG, ("other", "embedding", "denoise", "embedding")]
    assert "filled twice" in refused(graph([encode(), encode("other"), denoise(), decode()], edges), "denoise")


def test_an_edge_given_twice_is_refused() -> None:
    assert "filled twice" in refused(graph([encode(), denoise(), decode()], [*TXT2IMG, TXT2IMG[1]]), "decode")


@pytest.mark.parametrize(
    "edge", [("ghost", "embedding", "denoise", "embedding"), ("encode", "embedding", "ghost", "latent")]
)
def test_an_edge_to_nowhere_is_refused(edge: Edge) -> None:
    assert "not in the graph" in refused(graph([encode(), denoise()], [edge]), "ghost")


def test_unknown_ports_are_refused_at_the_node_that_lacks_them() -> None:
    nodes = [encode(), denoise()]
    assert "no output port 'latent'" in refused(graph(nodes, [("encode", "latent", "denoise", "embedding")]), "encode")
    assert "no input port 'image'" in refused(graph(nodes, [("encode", "embedding", "denoise", "image")]), "denoise")


def test_kinds_that_differ_are_refused() -> None:
    edges = [("encode", "embedding", "decode", "latent")]
    assert "takes a latent on port 'latent', and 'encode' gives a embedding" in refused(
        graph([encode(), decode()], edges), "decode"
    )


def test_another_models_latent_is_refused() -> None:
    message = refused(graph([encode(), denoise(), decode(model_id="tiny-sd")], TXT2IMG), "decode")
    assert "of model 'tiny-sd', and its latent comes from 'shapes'" in message


def test_another_models_embedding_is_refused() -> None:
    refused(graph([encode(model_id="tiny-sd"), denoise(), decode()], TXT2IMG), "denoise")


def test_a_cycle_is_refused_at_one_of_its_nodes() -> None:
    """No kinds that a client can write form a cycle today, so this one is made of values."""
    work = parse_graph(graph([encode(), denoise()], TXT2IMG[:1])).nodes[1].work
    with pytest.raises(InvalidGraph, match="waits for itself") as caught:
        make_graph({"a": (work, {"embedding": "b"}), "b": (work, {"embedding": "a"})})
    assert caught.value.facts["node"] in ("a", "b")


def test_an_edge_from_a_node_to_itself_is_refused() -> None:
    refused(graph([encode(), denoise()], [("denoise", "latent", "denoise", "embedding")]), "denoise")


@given(st.binary(max_size=200))
def test_random_bytes_are_no_message_or_no_graph(raw: bytes) -> None:
    with pytest.raises((DecodeError, InvalidGraph)):
        parse_graph(graph_pb2.Graph.FromString(raw))


RANGES: list[Edge] = [
    ("encode", "embedding", "base", "embedding"),
    ("other", "embedding", "refiner", "embedding"),
    ("base", "latent", "refiner", "latent"),
    ("refiner", "latent", "decode", "latent"),
]


def ranges(**refiner: Any) -> list[graph_pb2.Node]:
    """A base that stops at step 3, and a refiner of another model."""
    return [
        encode(),
        encode("other", model_id="refiner"),
        denoise("base", to_step=3),
        denoise("refiner", **{"model_id": "refiner", "from_step": 3, **refiner}),
        decode(model_id="refiner"),
    ]


def test_a_refiner_takes_over_where_the_base_stopped() -> None:
    parsed = {node.node_id: node for node in parse_graph(graph(ranges(), RANGES)).nodes}
    assert parsed["refiner"].sources == {"embedding": "other", "latent": "base"}


def test_a_refiner_goes_on_only_where_the_base_stopped_and_nowhere_without_it() -> None:
    assert "goes on from step 2" in refused(graph(ranges(from_step=2), RANGES), "refiner")
    assert "no input port 'latent'" in refused(graph(ranges(from_step=0), RANGES), "refiner")
    assert "nothing on its input port 'latent'" in refused(graph(ranges(), [*RANGES[:2], RANGES[3]]), "refiner")
    assert "to_step" in refused(graph(ranges(to_step=3), RANGES), "refiner")
