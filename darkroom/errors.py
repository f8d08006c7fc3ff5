"""What can go wrong, split by what the caller can do about it.

    DarkroomError
    ├── InvalidRequest        change the request
    │   ├── InvalidField          a field's value
    │   ├── InvalidTensor         a tensor's type, shape or bytes
    │   ├── InvalidGraph          a node of a graph
    │   ├── InvalidCheckpoint     a checkpoint that is none, or of another request
    │   ├── InvalidCall           arguments that a network does not take
    │   ├── UnknownHolder         a tensor ref that points outside the cluster
    │   └── MalformedMessage      bytes that are no message
    ├── NotFound              ask for something else
    │   ├── ModelNotFound
    │   ├── LoraNotFound
    │   ├── NetworkNotHeld
    │   └── TensorNotFound
    ├── UnusableModel         ask the operator to repair the model
    ├── UnusableLora          likewise
    ├── UnusableCheckpoint    start again without it
    ├── StaleEpoch            give up: a later attempt has taken over
    ├── Deposed               step down: another leader may have been elected
    ├── DigestMismatch        bytes are not what their name says
    ├── Overloaded            try again after `retry_after_s`
    │   ├── QueueFull
    │   └── DeviceFull
    ├── Unavailable           try another replica
    │   ├── Draining
    │   ├── Moved                 go on elsewhere from the last checkpoint
    │   ├── Stalled
    │   ├── StageUnavailable
    │   ├── StoreUnavailable
    │   └── RegistryUnavailable
    └── DeadlinePassed        allow more time

Constructors take facts and build the message. Facts are strings, so that an error survives the wire whole.
"""

from __future__ import annotations

import re


class DarkroomError(Exception):
    """Everything that Darkroom raises on purpose. `facts` are what the message was built from."""

    def __init__(self, message: str, **facts: str) -> None:
        super().__init__(message)
        self.message = message
        self.facts = facts

    @classmethod
    def reason(cls) -> str:
        """The class name in upper snake case: `QueueFull` is `QUEUE_FULL`."""
        return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", cls.__name__).upper()


class InvalidRequest(DarkroomError):
    """The request can never succeed as it is."""


class InvalidField(InvalidRequest):
    """A field's value is out of its range."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field} {problem}", field=field, problem=problem)


class InvalidTensor(InvalidRequest):
    """A tensor's type, shape and bytes do not agree, or are not allowed."""

    def __init__(self, tensor: str, problem: str) -> None:
        super().__init__(f"tensor {tensor} {problem}", tensor=tensor, problem=problem)


class InvalidGraph(InvalidRequest):
    """A node or edge of a graph is wrong."""

    def __init__(self, node: str, problem: str) -> None:
        super().__init__(f"graph node {node!r} {problem}", node=node, problem=problem)


class InvalidCheckpoint(InvalidRequest):
    """A checkpoint cannot be read, or belongs to another request."""

    def __init__(self, problem: str) -> None:
        super().__init__(f"checkpoint {problem}", problem=problem)


class InvalidCall(InvalidRequest):
    """A network does not take these arguments."""

    def __init__(self, network: str, problem: str) -> None:
        super().__init__(f"network {network} {problem}", network=network, problem=problem)


class UnknownHolder(InvalidRequest):
    """A tensor ref names an address that is no replica of this cluster."""

    def __init__(self, tensor: str) -> None:
        super().__init__(f"tensor {tensor} refers to an address that is no replica of this cluster", tensor=tensor)


class MalformedMessage(InvalidRequest):
    """The bytes received are no message of the expected kind."""

    def __init__(self, message_type: str) -> None:
        super().__init__(f"the bytes received are no {message_type}", message_type=message_type)


class NotFound(DarkroomError):
    """What the request names does not exist."""


class ModelNotFound(NotFound):
    """No model of this id is in the catalogue."""

    def __init__(self, model_id: str) -> None:
        super().__init__(f"model_id {model_id!r} is not in the catalogue", model_id=model_id)


class LoraNotFound(NotFound):
    """No LoRA of this id is in the catalogue."""

    def __init__(self, field: str, lora_id: str) -> None:
        super().__init__(f"{field} {lora_id!r} is not in the catalogue", field=field, lora_id=lora_id)


class NetworkNotHeld(NotFound):
    """The model has no such network, or another stage holds it."""

    def __init__(self, network: str) -> None:
        super().__init__(f"network {network!r} is not held here", network=network)


class TensorNotFound(NotFound):
    """The holder does not keep this tensor, or no longer."""

    def __init__(self, digest: str) -> None:
        super().__init__(f"tensor {digest} is not held here, or no longer", digest=digest)


class UnusableModel(DarkroomError):
    """The model exists, but its files cannot be served."""

    def __init__(self, model_id: str, problem: str) -> None:
        super().__init__(f"model_id {model_id!r} cannot be used: {problem}", model_id=model_id, problem=problem)


class UnusableLora(DarkroomError):
    """The LoRA exists, but its file cannot be used."""

    def __init__(self, field: str, lora_id: str, problem: str) -> None:
        super().__init__(
            f"{field} {lora_id!r} cannot be used: {problem}", field=field, lora_id=lora_id, problem=problem
        )


class UnusableCheckpoint(DarkroomError):
    """The checkpoint is sound, but this replica cannot go on from it exactly."""

    def __init__(self, problem: str) -> None:
        super().__init__(f"checkpoint cannot be used here: {problem}", problem=problem)


class StaleEpoch(DarkroomError):
    """Another attempt at the same request, with a later epoch, has taken over."""

    def __init__(self, epoch: str, latest: str) -> None:
        super().__init__(f"epoch {epoch} is over: epoch {latest} has taken over", epoch=epoch, latest=latest)


class Deposed(DarkroomError):
    """A leader's write came after its term had ended; nothing was written."""

    def __init__(self, term: str) -> None:
        super().__init__(f"term {term} is over: nothing was written", term=term)


class DigestMismatch(DarkroomError):
    """Fetched bytes are not what their digest says."""

    def __init__(self, digest: str) -> None:
        super().__init__(f"the bytes fetched for tensor {digest} have another digest", digest=digest)


class Overloaded(DarkroomError):
    """Healthy, but with no room left."""

    retry_after_s: float = 1.0


class QueueFull(Overloaded):
    """The replica has as many requests as it accepts."""

    def __init__(self, limit: str, retry_after_s: str) -> None:
        super().__init__(
            f"{limit} requests are running; try again in {retry_after_s} s", limit=limit, retry_after_s=retry_after_s
        )
        self.retry_after_s = float(retry_after_s)


class DeviceFull(Overloaded):
    """The models that running requests use leave no room for another."""

    def __init__(self, model_id: str, retry_after_s: str) -> None:
        super().__init__(
            f"the device has no room for model_id {model_id!r} beside what is running; try again in {retry_after_s} s",
            model_id=model_id,
            retry_after_s=retry_after_s,
        )
        self.retry_after_s = float(retry_after_s)


class Unavailable(DarkroomError):
    """Down or going down; another replica may serve it."""


class Draining(Unavailable):
    """The replica finishes what it has and takes nothing new."""

    def __init__(self, replica_id: str) -> None:
        super().__init__(f"replica {replica_id} is draining", replica_id=replica_id)


class Moved(Unavailable):
    """The replica goes down and hands the request back: it goes on elsewhere from its last checkpoint."""

    def __init__(self, replica_id: str) -> None:
        super().__init__(f"replica {replica_id} hands the request back", replica_id=replica_id)


class Stalled(Unavailable):
    """The replica's engine does not come back from a forward."""

    def __init__(self, replica_id: str) -> None:
        super().__init__(f"replica {replica_id} makes no progress", replica_id=replica_id)


class StageUnavailable(Unavailable):
    """No replica of the stage could be reached."""

    def __init__(self, stage: str, problem: str) -> None:
        super().__init__(f"no {stage} replica could serve the request: {problem}", stage=stage, problem=problem)


class StoreUnavailable(Unavailable):
    """What the model store has is not on this node, and cannot be brought here now."""

    def __init__(self, what: str, problem: str) -> None:
        super().__init__(f"{what} cannot be fetched from the model store: {problem}", what=what, problem=problem)


class RegistryUnavailable(Unavailable):
    """The registry (etcd) does not answer."""

    def __init__(self, what: str) -> None:
        super().__init__(f"the registry is not available: {what}", what=what)


class DeadlinePassed(DarkroomError):
    """The request's time ran out."""

    def __init__(self, stage: str) -> None:
        super().__init__(f"the deadline passed at the {stage} stage", stage=stage)
