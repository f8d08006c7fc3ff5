"""Calls of a network by another replica, as checked values: JSON that names tensors, and the tensors."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from darkroom.errors import InvalidCall, InvalidField, InvalidTensor
from darkroom.v1 import network_pb2, tensor_pb2
from darkroom.wire import fields
from darkroom.wire.tensors import RawTensor, RemoteTensor, parse_tensor

METHODS = ("forward", "encode", "decode")
_MAX_TREE_CHARACTERS = 1 << 20
_MAX_TENSORS = 1024


@dataclass(frozen=True, slots=True)
class Tree:
    """JSON, and the tensors that it names."""

    json: Any
    tensors: Mapping[str, RawTensor | RemoteTensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkCall:
    """One call of a network."""

    request_id: str
    model_id: str
    network: str
    method: str
    arguments: Tree
    deterministic: bool


def parse_call(message: network_pb2.CallNetworkRequest) -> NetworkCall:
    """Raises InvalidField, InvalidTensor or InvalidCall."""
    if message.method not in METHODS:
        raise InvalidField("method", f"must be one of {', '.join(METHODS)}")
    if not message.network.isidentifier() or len(message.network) > fields.MAX_NAME_CHARACTERS:
        raise InvalidField("network", "must be the name of a pipeline's component")
    return NetworkCall(
        request_id=fields.check_request_id(message.request_id),
        model_id=fields.check_model_id(message.model_id),
        network=message.network,
        method=message.method,
        arguments=parse_tree(message.network, message.arguments_json, list(message.tensors)),
        deterministic=message.deterministic,
    )


def parse_tree(network: str, text: str, tensors: list[tensor_pb2.NamedTensor]) -> Tree:
    """A tree as it came. Raises InvalidTensor or InvalidCall."""
    if len(text) > _MAX_TREE_CHARACTERS or len(tensors) > _MAX_TENSORS:
        raise InvalidCall(network, "is called with too much at once")
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidCall(network, "is called with arguments that are no JSON") from error
    named: dict[str, RawTensor | RemoteTensor] = {}
    for message in tensors:
        if message.name in named:
            raise InvalidTensor(message.name[:64], "is given twice")
        named[message.name] = parse_tensor(message.name[:64], message.tensor)
    return Tree(parsed, named)


def tree_json(tree: Any) -> str:
    """The JSON as it travels."""
    return json.dumps(tree, separators=(",", ":"), allow_nan=False)
