"""The outermost layer of every RPC: bytes to message, DarkroomError to status, bugs to the log and nowhere else."""

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import structlog
from google.protobuf.message import DecodeError
from google.rpc import code_pb2, status_pb2
from grpc_status import rpc_status

from darkroom.errors import DarkroomError, Draining, MalformedMessage
from darkroom.wire.status import to_status

_log = structlog.get_logger()
_OURS = "/darkroom."


class Guard(grpc.aio.ServerInterceptor):
    """Wraps every method of Darkroom's own services. Refuses new work once `is_draining` says so."""

    def __init__(self, *, replica_id: str, is_draining: Callable[[], bool]) -> None:
        """`replica_id` names this replica in the refusal."""
        self._replica_id = replica_id
        self._is_draining = is_draining

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        """The method's handler, guarded."""
        handler = await continuation(details)
        if handler is None or not details.method.startswith(_OURS) or handler.request_streaming:
            return handler
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                self._streaming(details.method, handler), None, handler.response_serializer
            )
        return grpc.unary_unary_rpc_method_handler(
            self._unary(details.method, handler), None, handler.response_serializer
        )

    def _unary(self, method: str, handler: Any) -> Any:
        async def guarded(raw: bytes, context: Any) -> Any:
            try:
                return await handler.unary_unary(self._parse(method, handler, raw), context)
            except Exception as error:  # noqa: BLE001 - the process must go on serving others
                await _abort(context, method, error)

        return guarded

    def _streaming(self, method: str, handler: Any) -> Any:
        async def guarded(raw: bytes, context: Any) -> AsyncIterator[Any]:
            try:
                async with contextlib.aclosing(
                    handler.unary_stream(self._parse(method, handler, raw), context)
                ) as responses:
                    async for response in responses:
                        yield response
            except Exception as error:  # noqa: BLE001 - the process must go on serving others
                await _abort(context, method, error)

        return guarded

    def _parse(self, method: str, handler: Any, raw: bytes) -> Any:
        if self._is_draining() and not method.endswith(("/Fetch", "/DescribeReplica")):
            raise Draining(self._replica_id)
        try:
            return handler.request_deserializer(raw)
        except DecodeError as error:
            raise MalformedMessage(f"{method.rsplit('/', 1)[-1]}Request") from error


async def _abort(context: Any, method: str, error: Exception) -> None:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if isinstance(error, DarkroomError):
        status = to_status(error)
        _log.info("request_failed", method=method, reason=error.reason())
    else:
        status = status_pb2.Status(code=code_pb2.UNKNOWN, message="internal error")
        _log.error("request_crashed", method=method, exc_info=error)
    await context.abort_with_status(rpc_status.to_status(status))
