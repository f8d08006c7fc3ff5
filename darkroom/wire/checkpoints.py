"""A denoising request's state between two steps, as it travels: docs/checkpoints.md has the format."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from darkroom.errors import DigestMismatch, InvalidCheckpoint, InvalidTensor, UnusableCheckpoint
from darkroom.v1 import checkpoint_pb2, tensor_pb2
from darkroom.wire.tensors import RawTensor, parse_tensor, value_message

FORMAT_VERSION = 1
EVERY_STEP_LIMIT_BYTES = 1 << 20
"""Up to this size a checkpoint may come with every step."""
_MAX_TENSORS = 256
_MAX_STATE_CHARACTERS = 1 << 20
_MAX_MADE_BY = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """What another replica needs to go on. `state` is JSON; its tensors are named by it."""

    epoch: int
    step: int
    step_count: int
    task_digest: str
    made_by: Mapping[str, str]
    state: Mapping[str, Any]
    tensors: Mapping[str, RawTensor]


def parse_checkpoint(message: checkpoint_pb2.Checkpoint) -> Checkpoint:
    """Raises UnusableCheckpoint, DigestMismatch, InvalidCheckpoint or InvalidTensor."""
    if message.format_version != FORMAT_VERSION:
        raise UnusableCheckpoint(f"its format is {message.format_version}, not {FORMAT_VERSION}")
    if len(message.tensors) > _MAX_TENSORS or len(message.made_by) > _MAX_MADE_BY:
        raise InvalidCheckpoint("has too many parts")
    if len(message.state_json) > _MAX_STATE_CHARACTERS:
        raise InvalidCheckpoint(f"has over {_MAX_STATE_CHARACTERS} characters of state")
    if _digest(message) != message.digest:
        raise DigestMismatch(message.digest[:64])
    if message.epoch < 0 or not 1 <= message.step <= message.step_count:
        raise InvalidCheckpoint("has a step or epoch out of range")
    return Checkpoint(
        epoch=message.epoch,
        step=message.step,
        step_count=message.step_count,
        task_digest=message.task_digest,
        made_by=dict(message.made_by),
        state=_parse_state(message.state_json),
        tensors={named.name: _parse_value(named) for named in message.tensors},
    )


def _parse_state(text: str) -> dict[str, Any]:
    try:
        state = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidCheckpoint("has a state that is no JSON") from error
    if not isinstance(state, dict):
        raise InvalidCheckpoint("has a state that is no JSON object")
    return state


def _parse_value(named: tensor_pb2.NamedTensor) -> RawTensor:
    tensor = parse_tensor(named.name[:64], named.tensor)
    if not isinstance(tensor, RawTensor):
        raise InvalidTensor(named.name[:64], "of a checkpoint must be given by value")
    return tensor


def checkpoint_message(checkpoint: Checkpoint) -> checkpoint_pb2.Checkpoint:
    """The checkpoint with its digest."""
    message = checkpoint_pb2.Checkpoint(
        format_version=FORMAT_VERSION,
        epoch=checkpoint.epoch,
        step=checkpoint.step,
        step_count=checkpoint.step_count,
        task_digest=checkpoint.task_digest,
        made_by=checkpoint.made_by,
        state_json=json.dumps(checkpoint.state, separators=(",", ":"), allow_nan=False),
        tensors=[
            tensor_pb2.NamedTensor(name=name, tensor=value_message(tensor))
            for name, tensor in checkpoint.tensors.items()
        ],
    )
    message.digest = _digest(message)
    return message


def _digest(message: checkpoint_pb2.Checkpoint) -> str:
    head = [
        message.format_version,
        message.epoch,
        message.step,
        message.step_count,
        message.task_digest,
        sorted(message.made_by.items()),
        message.state_json,
        [[named.name, named.tensor.element_type, list(named.tensor.shape)] for named in message.tensors],
    ]
    digest = hashlib.sha256(json.dumps(head, separators=(",", ":")).encode())
    for named in message.tensors:
        digest.update(named.tensor.data)
    return digest.hexdigest()
