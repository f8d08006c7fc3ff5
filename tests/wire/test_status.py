"""Errors survive the wire whole, and foreign statuses become errors of ours."""

import ast
from pathlib import Path
from typing import TypeVar

import grpc
import pytest
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from darkroom import errors
from darkroom.wire.status import from_rpc_error, to_status

EXAMPLES: list[tuple[errors.DarkroomError, int]] = [
    (errors.InvalidField("seed", "must be positive"), code_pb2.INVALID_ARGUMENT),
    (errors.InvalidTensor("latents", "has 3 bytes"), code_pb2.INVALID_ARGUMENT),
    (errors.InvalidGraph("größe", "waits for itself"), code_pb2.INVALID_ARGUMENT),
    (errors.UnknownHolder("latents"), code_pb2.INVALID_ARGUMENT),
    (errors.MalformedMessage("EncodeRequest"), code_pb2.INVALID_ARGUMENT),
    (errors.ModelNotFound("shapes"), code_pb2.NOT_FOUND),
    (errors.LoraNotFound("loras[0].lora_id", "ink"), code_pb2.NOT_FOUND),
    (errors.UnusableLora("loras[0]", "ink", "its header is cut off"), code_pb2.FAILED_PRECONDITION),
    (errors.NetworkNotHeld("unet"), code_pb2.NOT_FOUND),
    (errors.TensorNotFound("abc"), code_pb2.NOT_FOUND),
    (errors.InvalidCheckpoint("is none"), code_pb2.INVALID_ARGUMENT),
    (errors.InvalidCall("vae", "is called with too much at once"), code_pb2.INVALID_ARGUMENT),
    (errors.UnusableModel("shapes", "its index is empty"), code_pb2.FAILED_PRECONDITION),
    (errors.UnusableCheckpoint("its format is 2"), code_pb2.FAILED_PRECONDITION),
    (errors.StaleEpoch("1", "2"), code_pb2.FAILED_PRECONDITION),
    (errors.Deposed("7"), code_pb2.FAILED_PRECONDITION),
    (errors.DigestMismatch("abc"), code_pb2.DATA_LOSS),
    (errors.QueueFull("64", "1.5"), code_pb2.RESOURCE_EXHAUSTED),
    (errors.DeviceFull("shapes", "5"), code_pb2.RESOURCE_EXHAUSTED),
    (errors.Draining("vae-1"), code_pb2.UNAVAILABLE),
    (errors.Moved("denoiser-1"), code_pb2.UNAVAILABLE),
    (errors.Stalled("denoiser-1"), code_pb2.UNAVAILABLE),
    (errors.StageUnavailable("vae", "none is up"), code_pb2.UNAVAILABLE),
    (errors.StoreUnavailable("shapes", "it does not answer"), code_pb2.UNAVAILABLE),
    (errors.RegistryUnavailable("no answer"), code_pb2.UNAVAILABLE),
    (errors.DeadlinePassed("denoiser"), code_pb2.DEADLINE_EXCEEDED),
]
D = TypeVar("D", error_details_pb2.RetryInfo, error_details_pb2.BadRequest, error_details_pb2.ErrorInfo)


def sent(status: status_pb2.Status) -> grpc.aio.AioRpcError:
    """What a client's call fails with when a server answers so."""
    wire = rpc_status.to_status(status)
    return grpc.aio.AioRpcError(
        wire.code, grpc.aio.Metadata(), grpc.aio.Metadata(*wire.trailing_metadata), wire.details
    )


def plain(code: grpc.StatusCode, details: str | None = "said") -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details)


def forged(reason: str, facts: dict[str, str], domain: str = "darkroom") -> grpc.aio.AioRpcError:
    status = status_pb2.Status(code=code_pb2.UNAVAILABLE, message="said")
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason=reason, domain=domain, metadata=facts))
    return sent(status)


def detail(status: status_pb2.Status, kind: type[D]) -> D | None:
    message = kind()
    return next((message for packed in status.details if packed.Unpack(message)), None)


def leaves(root: type[errors.DarkroomError]) -> set[type[errors.DarkroomError]]:
    below = root.__subclasses__()
    return {leaf for child in below for leaf in leaves(child)} if below else {root}


def test_there_is_an_example_of_every_error() -> None:
    assert {type(error) for error, _ in EXAMPLES} == leaves(errors.DarkroomError)


def test_no_module_adds_to_the_tree() -> None:
    """The table is made of the classes that there are when it is first imported, whatever else is imported later."""
    names = {name for name in dir(errors) if name[0].isupper()}
    assert errors.__file__ is not None
    for path in Path(errors.__file__).parent.rglob("*.py"):
        classes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)]
        bases = {
            base.attr if isinstance(base, ast.Attribute) else ast.unparse(base) for c in classes for base in c.bases
        }
        assert path.name == "errors.py" or not names & bases, path


def test_no_two_errors_have_one_reason() -> None:
    assert len({error.reason() for error, _ in EXAMPLES}) == len(EXAMPLES)


@pytest.mark.parametrize(("error", "code"), EXAMPLES, ids=lambda value: type(value).__name__)
def test_every_error_survives_the_wire(error: errors.DarkroomError, code: int) -> None:
    status = to_status(error)
    assert status.code == code
    back = from_rpc_error(sent(status), "vae")
    assert type(back) is type(error)
    assert back is not None
    assert (back.message, back.facts) == (error.message, error.facts)


def test_the_reason_is_the_class_name() -> None:
    info = detail(to_status(errors.QueueFull("64", "1")), error_details_pb2.ErrorInfo)
    assert info is not None
    assert (info.reason, info.domain, dict(info.metadata)) == (
        "QUEUE_FULL",
        "darkroom",
        {"limit": "64", "retry_after_s": "1"},
    )


def test_only_an_overloaded_service_says_when_to_come_back() -> None:
    for error, _ in EXAMPLES:
        retry = detail(to_status(error), error_details_pb2.RetryInfo)
        assert (retry is not None) == isinstance(error, errors.Overloaded)
    retry = detail(to_status(errors.QueueFull("64", "1.5")), error_details_pb2.RetryInfo)
    assert retry is not None
    assert retry.retry_delay.ToMilliseconds() == 1500


def test_only_a_wrong_field_is_named_as_a_violation() -> None:
    for error, _ in EXAMPLES:
        violations = detail(to_status(error), error_details_pb2.BadRequest)
        assert (violations is not None) == isinstance(error, errors.InvalidField)
    violations = detail(to_status(errors.InvalidField("seed", "must be positive")), error_details_pb2.BadRequest)
    assert violations is not None
    assert [(v.field, v.description) for v in violations.field_violations] == [("seed", "seed must be positive")]


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED])
def test_a_broken_connection_is_an_unavailable_stage(code: grpc.StatusCode) -> None:
    error = from_rpc_error(plain(code, None), "vae")
    assert isinstance(error, errors.StageUnavailable)
    assert error.facts["stage"] == "vae"


def test_a_deadline_names_the_stage() -> None:
    error = from_rpc_error(plain(grpc.StatusCode.DEADLINE_EXCEEDED), "vae")
    assert isinstance(error, errors.DeadlinePassed)
    assert error.facts == {"stage": "vae"}


@pytest.mark.parametrize("code", [grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNIMPLEMENTED])
def test_a_bug_on_the_other_side_is_no_error_of_ours(code: grpc.StatusCode) -> None:
    assert from_rpc_error(plain(code), "vae") is None


def test_an_error_of_somebody_elses_domain_counts_by_its_code() -> None:
    error = from_rpc_error(forged("QUEUE_FULL", {"limit": "1", "retry_after_s": "1"}, domain="elsewhere"), "vae")
    assert isinstance(error, errors.StageUnavailable)


@pytest.mark.parametrize(
    ("reason", "facts"),
    [
        ("NEWER_ERROR", {}),
        ("QUEUE_FULL", {}),
        ("QUEUE_FULL", {"limit": "1", "retry_after_s": "soon"}),
        ("DRAINING", {"replica_id": "vae-1", "since_s": "3"}),
        ("DRAINING", {"self": "x"}),
    ],
)
def test_an_error_that_another_version_words_differently_counts_by_its_code(reason: str, facts: dict[str, str]) -> None:
    assert isinstance(from_rpc_error(forged(reason, facts), "vae"), errors.StageUnavailable)


def test_a_status_that_contradicts_its_details_counts_by_its_code() -> None:
    wire = rpc_status.to_status(to_status(errors.ModelNotFound("shapes")))
    trailing = grpc.aio.Metadata(*wire.trailing_metadata)
    error = grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), trailing, "reset")
    assert isinstance(from_rpc_error(error, "vae"), errors.StageUnavailable)
