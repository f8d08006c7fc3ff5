"""What travels through a graph, and what is said about it on the way."""

from dataclasses import dataclass
from typing import Any, NewType

from darkroom.wire.tensors import RawTensor, RemoteTensor

CheckpointMessage = NewType("CheckpointMessage", Any)  # type: ignore[valid-newtype]
"""A stage's checkpoint as it came: the router only passes it on."""


@dataclass(frozen=True, slots=True)
class Embedding:
    """An encoder's answer: small tensors by value, large ones by ref."""

    tensors: dict[str, RawTensor | RemoteTensor]


@dataclass(frozen=True, slots=True)
class Latent:
    """A denoiser's answer, with the size of the image it stands for."""

    tensor: RawTensor | RemoteTensor
    width_px: int
    height_px: int
    batched_forward_count: int
    cached_forward_count: int = 0
    checkpoint: CheckpointMessage | None = None
    """Where another model goes on from, of a node that stopped before its end."""


@dataclass(frozen=True, slots=True)
class ImageFile:
    """A PNG."""

    data: bytes
    width_px: int
    height_px: int


@dataclass(frozen=True, slots=True)
class Images:
    """A VAE's answer."""

    files: tuple[ImageFile, ...]


Value = Embedding | Latent | Images


@dataclass(frozen=True, slots=True)
class Answer:
    """A stage's answer, and the time it says it took."""

    value: Value
    run_s: float


@dataclass(frozen=True, slots=True)
class NodeStarted:
    """A node was handed to a replica."""

    node_id: str
    stage: str
    replica_id: str


@dataclass(frozen=True, slots=True)
class StepDone:
    """A denoising step is done."""

    step: int
    step_count: int
    previews: tuple[bytes, ...]
    """JPEG files, one per image, where they were due."""


@dataclass(frozen=True, slots=True)
class NodeProgress:
    """A denoising step of a node is done."""

    node_id: str
    done: StepDone


@dataclass(frozen=True, slots=True)
class NodeTiming:
    """Where the time of one node went."""

    node_id: str
    stage: str
    replica_id: str
    call_s: float
    run_s: float
    attempt_count: int


@dataclass(frozen=True, slots=True)
class Finished:
    """Every node is done."""

    values: dict[str, Value]
    timings: tuple[NodeTiming, ...]
    total_s: float


Event = NodeStarted | NodeProgress | Finished
