"""The one table between DarkroomError and gRPC status; nobody else knows both sides."""

import contextlib

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import DecodeError
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from darkroom import errors

DOMAIN = "darkroom"

_CODES: dict[type[errors.DarkroomError], int] = {
    errors.InvalidRequest: code_pb2.INVALID_ARGUMENT,
    errors.NotFound: code_pb2.NOT_FOUND,
    errors.UnusableModel: code_pb2.FAILED_PRECONDITION,
    errors.UnusableLora: code_pb2.FAILED_PRECONDITION,
    errors.UnusableCheckpoint: code_pb2.FAILED_PRECONDITION,
    errors.StaleEpoch: code_pb2.FAILED_PRECONDITION,
    errors.Deposed: code_pb2.FAILED_PRECONDITION,
    errors.DigestMismatch: code_pb2.DATA_LOSS,
    errors.Overloaded: code_pb2.RESOURCE_EXHAUSTED,
    errors.Unavailable: code_pb2.UNAVAILABLE,
    errors.DeadlinePassed: code_pb2.DEADLINE_EXCEEDED,
}


def _leaves(root: type[errors.DarkroomError]) -> list[type[errors.DarkroomError]]:
    below = root.__subclasses__()
    return [leaf for child in below for leaf in _leaves(child)] if below else [root]


_BY_REASON = {leaf.reason(): leaf for leaf in _leaves(errors.DarkroomError)}


def to_status(error: errors.DarkroomError) -> status_pb2.Status:
    """The error as a status: ErrorInfo always, RetryInfo for Overloaded, BadRequest for a wrong field."""
    code = next(code for kind, code in _CODES.items() if isinstance(error, kind))
    info = error_details_pb2.ErrorInfo(reason=error.reason(), domain=DOMAIN, metadata=error.facts)
    details = [_packed(info)]
    if isinstance(error, errors.Overloaded):
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(int(error.retry_after_s * 1000))
        details.append(_packed(error_details_pb2.RetryInfo(retry_delay=delay)))
    if isinstance(error, errors.InvalidField):
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.facts["field"], description=error.message)
        details.append(_packed(error_details_pb2.BadRequest(field_violations=[violation])))
    return status_pb2.Status(code=code, message=error.message, details=details)


def _packed(
    detail: error_details_pb2.ErrorInfo | error_details_pb2.RetryInfo | error_details_pb2.BadRequest,
) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(detail)
    return packed


def from_rpc_error(error: grpc.aio.AioRpcError, stage: str) -> errors.DarkroomError | None:
    """The error that a call to `stage` failed with; None when the other side had a bug.

    A connection that broke carries no ErrorInfo: it is StageUnavailable. An error that another version words in other
    facts counts by its code.
    """
    for info in _error_infos(error):
        if info.domain == DOMAIN and info.reason in _BY_REASON:
            with contextlib.suppress(TypeError, ValueError):
                return _BY_REASON[info.reason](**info.metadata)
    match error.code():
        case grpc.StatusCode.UNAVAILABLE:
            return errors.StageUnavailable(stage, error.details() or "the connection broke")
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return errors.DeadlinePassed(stage)
        case grpc.StatusCode.CANCELLED:
            return errors.StageUnavailable(stage, "the call was cancelled by the other side")
    return None


def _error_infos(error: grpc.aio.AioRpcError) -> list[error_details_pb2.ErrorInfo]:
    try:
        status = rpc_status.from_call(error)  # type: ignore[arg-type]  # takes any error with code, details and metadata
    except (ValueError, DecodeError):  # the details contradict the status, or are none
        return []
    infos = []
    for detail in status.details if status else ():
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info):
            infos.append(info)
    return infos
