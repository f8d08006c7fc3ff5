"""Snapshots of this process as checkpoints for any process, and back."""

import json
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version

import torch

from darkroom.errors import InvalidCheckpoint, UnusableCheckpoint
from darkroom.models.journal import Snapshot
from darkroom.models.tensors import check_finite, to_raw, to_torch
from darkroom.wire.checkpoints import Checkpoint
from darkroom.wire.tasks import DenoiseTask

_STATE_PARTS = frozenset({"outputs", "solver", "generators", "shapes", "cache"})


def to_checkpoint(snapshot: Snapshot, *, epoch: int, task_digest: str, device: torch.device) -> Checkpoint:
    """The snapshot as it travels, for the task of this digest."""
    return Checkpoint(
        epoch=epoch,
        step=snapshot.step,
        step_count=snapshot.step_count,
        task_digest=task_digest,
        made_by=made_by(device.type),
        state=snapshot.state,
        tensors={name: to_raw(tensor) for name, tensor in snapshot.tensors.items()},
    )


def to_snapshot(checkpoint: Checkpoint, task: DenoiseTask, device: torch.device) -> Snapshot:
    """The snapshot to go on from. Raises UnusableCheckpoint, InvalidCheckpoint or InvalidTensor."""
    is_range = task.from_step > 0
    if is_range and checkpoint.step != task.from_step:
        raise InvalidCheckpoint(f"is of step {checkpoint.step}, and from_step is {task.from_step}")
    if not is_range and checkpoint.task_digest != task.digest:
        raise InvalidCheckpoint("belongs to another request")
    here = made_by(device.type)
    if not is_range and dict(checkpoint.made_by) != here:
        raise UnusableCheckpoint(f"it was made by {_listed(checkpoint.made_by)}, and this is {_listed(here)}")
    if not checkpoint.state.keys() >= _STATE_PARTS or not isinstance(checkpoint.state["shapes"], dict):
        raise InvalidCheckpoint("lacks a part of its state")
    tensors = {name: to_torch(tensor) for name, tensor in checkpoint.tensors.items()}
    latents = json.dumps(checkpoint.state["outputs"])
    for name, tensor in tensors.items():
        if f'"{name}"' in latents and tensor.is_floating_point():
            check_finite(name[:64], tensor)
    return Snapshot(checkpoint.step, checkpoint.step_count, checkpoint.state, tensors)


@cache
def made_by(device_type: str) -> dict[str, str]:
    """What has to agree for going on to be exact."""
    return {
        "darkroom": version("darkroom"),
        "diffusers": version("diffusers"),
        "torch": version("torch"),
        "device": device_type,
    }


def _listed(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{str(name)[:16]} {str(value)[:32]}" for name, value in sorted(versions.items()))
