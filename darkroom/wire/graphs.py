"""Graphs as checked values: what a client may ask for, in an order in which it can run."""

import re
from collections import Counter
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter

from darkroom.errors import InvalidField, InvalidGraph
from darkroom.v1 import graph_pb2
from darkroom.wire import fields
from darkroom.wire.conditions import NO_CONDITIONS, ConditionFiles, parse_conditions
from darkroom.wire.tasks import LoraUse, parse_loras

MAX_NODES = 64
_NODE_ID = re.compile(r"[a-z0-9_-]{1,64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeTextWork:
    """Encodes a prompt."""

    model_id: str
    prompt: str
    negative_prompt: str
    guided: bool
    loras: tuple[LoraUse, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class DenoiseWork:
    """Denoises from an embedding."""

    model_id: str
    width_px: int
    height_px: int
    step_count: int
    guidance_scale: float
    seed: int
    image_count: int
    scheduler: str
    loras: tuple[LoraUse, ...] = ()
    step_cache_threshold: float = 0.0
    preview_interval: int = 0
    frame_count: int = 0
    conditions: ConditionFiles = NO_CONDITIONS
    from_step: int = 0
    to_step: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeWork:
    """Decodes a latent to images of the size it was denoised at."""

    model_id: str
    parameters: dict[str, str] = field(default_factory=dict)


Work = EncodeTextWork | DenoiseWork | DecodeWork


@dataclass(frozen=True, slots=True)
class Port:
    """An input or output of a kind of node."""

    name: str
    kind: str


_EMBEDDING, _LATENT = Port("embedding", "embedding"), Port("latent", "latent")
OUTPUTS: dict[type, Port] = {
    EncodeTextWork: Port("embedding", "embedding"),
    DenoiseWork: _LATENT,
    DecodeWork: Port("image", "image"),
}


def inputs_of(work: Work) -> tuple[Port, ...]:
    """The input ports, each of which has to be filled once."""
    match work:
        case EncodeTextWork():
            return ()
        case DenoiseWork():
            return (_EMBEDDING, _LATENT) if work.from_step else (_EMBEDDING,)
        case DecodeWork():
            return (_LATENT,)


STAGES: dict[type, str] = {EncodeTextWork: "encoder", DenoiseWork: "denoiser", DecodeWork: "vae"}


@dataclass(frozen=True, slots=True)
class Node:
    """One piece of work, and for each input port the node that fills it."""

    node_id: str
    work: Work
    sources: dict[str, str]

    @property
    def stage(self) -> str:
        """The stage that runs it."""
        return STAGES[type(self.work)]


@dataclass(frozen=True, slots=True)
class Graph:
    """Checked nodes; each comes after those that feed it."""

    nodes: tuple[Node, ...]


def parse_graph(message: graph_pb2.Graph) -> Graph:
    """Checks a client's graph. Raises InvalidGraph naming the node."""
    if not message.nodes:
        raise InvalidGraph("", "is missing: the graph has no nodes")
    if len(message.nodes) > MAX_NODES:
        raise InvalidGraph(
            "", f"limit passed: the graph has {len(message.nodes)} nodes, at most {MAX_NODES} are allowed"
        )
    repeated = [node_id for node_id, count in Counter(n.id for n in message.nodes).items() if count > 1]
    if repeated:
        raise InvalidGraph(repeated[0][:64], "is given more than once")
    works = {node.id: _parse_work(node) for node in message.nodes}
    sources: dict[str, dict[str, str]] = {node_id: {} for node_id in works}
    for edge in message.edges:
        _connect(edge, works, sources)
    return make_graph({node_id: (work, sources[node_id]) for node_id, work in works.items()})


def make_graph(nodes: dict[str, tuple[Work, dict[str, str]]]) -> Graph:
    """Checks that every port is filled and no node waits for itself, and orders the nodes. Raises InvalidGraph."""
    for node_id, (work, sources) in nodes.items():
        for port in inputs_of(work):
            if port.name not in sources:
                raise InvalidGraph(node_id, f"has nothing on its input port {port.name!r}")
    try:
        order = list(
            TopologicalSorter({node_id: sources.values() for node_id, (_, sources) in nodes.items()}).static_order()
        )
    except CycleError as error:
        raise InvalidGraph(str(error.args[1][0]), "waits for itself") from error
    return Graph(tuple(Node(node_id, *nodes[node_id]) for node_id in order))


def _parse_work(node: graph_pb2.Node) -> Work:
    if not _NODE_ID.fullmatch(node.id):
        raise InvalidGraph(node.id[:64], "has an id that is not 1 to 64 characters of a-z 0-9 _ -")
    try:
        match node.WhichOneof("work"):
            case "encode_text":
                return _parse_encode_text(node.encode_text)
            case "denoise":
                return _parse_denoise(node.denoise)
            case "decode":
                parameters = fields.check_parameters(dict(node.decode.parameters))
                return DecodeWork(model_id=fields.check_model_id(node.decode.model_id), parameters=parameters)
    except InvalidField as error:
        raise InvalidGraph(node.id, f"has a wrong field: {error.message}") from error
    raise InvalidGraph(node.id, "has no work")


def _parse_encode_text(message: graph_pb2.EncodeText) -> EncodeTextWork:
    return EncodeTextWork(
        model_id=fields.check_model_id(message.model_id),
        prompt=fields.check_prompt(message.prompt),
        negative_prompt=fields.check_negative_prompt(message.negative_prompt),
        guided=message.guided,
        loras=parse_loras(message.loras),
    )


def _parse_denoise(message: graph_pb2.Denoise) -> DenoiseWork:
    width_px, height_px = fields.check_size(message.width_px, message.height_px, 1)
    image_count = fields.check_count("image_count", message.image_count, fields.MAX_IMAGES)
    return DenoiseWork(
        model_id=fields.check_model_id(message.model_id),
        width_px=width_px,
        height_px=height_px,
        step_count=fields.check_count("step_count", message.step_count, fields.MAX_STEPS),
        guidance_scale=fields.check_guidance_scale(message.guidance_scale),
        seed=fields.check_seed(message.seed, image_count),
        image_count=image_count,
        scheduler=message.scheduler,
        loras=parse_loras(message.loras),
        step_cache_threshold=fields.check_step_cache_threshold(message.step_cache_threshold),
        preview_interval=fields.check_range("preview_interval", message.preview_interval, 0, fields.MAX_STEPS),
        frame_count=fields.check_range("frame_count", message.frame_count, 0, fields.MAX_FRAMES),
        conditions=parse_conditions(message),
        from_step=fields.check_range("from_step", message.from_step, 0, 2 * fields.MAX_STEPS),
        to_step=_parse_to_step(message),
    )


def _parse_to_step(message: graph_pb2.Denoise) -> int:
    to_step = fields.check_range("to_step", message.to_step, 0, 2 * fields.MAX_STEPS)
    if to_step and to_step <= message.from_step:
        raise InvalidField("to_step", f"must be past from_step, {message.from_step}, not {to_step}")
    return to_step


def _connect(edge: graph_pb2.Edge, works: dict[str, Work], sources: dict[str, dict[str, str]]) -> None:
    for node_id in (edge.from_node, edge.to_node):
        if node_id not in works:
            raise InvalidGraph(node_id[:64], "is named by an edge and is not in the graph")
    giver, taker = works[edge.from_node], works[edge.to_node]
    output = OUTPUTS[type(giver)]
    port = next((port for port in inputs_of(taker) if port.name == edge.to_port), None)
    if edge.from_port != output.name:
        raise InvalidGraph(edge.from_node, f"has no output port {edge.from_port[:64]!r}")
    if port is None:
        raise InvalidGraph(edge.to_node, f"has no input port {edge.to_port[:64]!r}")
    if port.kind != output.kind:
        raise InvalidGraph(
            edge.to_node, f"takes a {port.kind} on port {port.name!r}, and {edge.from_node!r} gives a {output.kind}"
        )
    if isinstance(giver, DenoiseWork) and isinstance(taker, DenoiseWork):
        if giver.to_step != taker.from_step:
            raise InvalidGraph(
                edge.to_node,
                f"goes on from step {taker.from_step}, and {edge.from_node!r} stops at {giver.to_step or 'the last'}",
            )
    elif giver.model_id != taker.model_id:
        raise InvalidGraph(
            edge.to_node, f"is of model {taker.model_id!r}, and its {port.kind} comes from {giver.model_id!r}"
        )
    if port.name in sources[edge.to_node]:
        raise InvalidGraph(edge.to_node, f"has its input port {port.name!r} filled twice")
    sources[edge.to_node][port.name] = edge.from_node
