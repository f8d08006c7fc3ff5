"""Tensors between stages: small ones travel in the message, large ones wait here until they are fetched."""

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass

import grpc

from darkroom.errors import DigestMismatch, InvalidTensor, TensorNotFound, UnknownHolder
from darkroom.runtime.channels import Channels
from darkroom.v1 import tensor_pb2, tensor_pb2_grpc
from darkroom.wire.status import from_rpc_error
from darkroom.wire.tensors import (
    CHUNK_BYTES,
    INLINE_LIMIT_BYTES,
    RawTensor,
    RemoteTensor,
    check_size,
    digest_of,
    ref_message,
    value_message,
)

_LIFETIME_S = 300.0


@dataclass(frozen=True, slots=True)
class _Held:
    data: bytes
    expires_s: float


class TensorShelf:
    """The bytes this replica holds for others, by digest: for a while, and up to a bound."""

    def __init__(
        self, *, limit_bytes: int, inline_limit_bytes: int = INLINE_LIMIT_BYTES, lifetime_s: float = _LIFETIME_S
    ) -> None:
        """`limit_bytes`: all held bytes together, the oldest go first; `inline_limit_bytes`: what travels by value."""
        self._limit_bytes, self._inline_limit_bytes, self._lifetime_s = limit_bytes, inline_limit_bytes, lifetime_s
        self._held: OrderedDict[str, _Held] = OrderedDict()
        self.size_bytes = 0
        self.address = ""

    def publish(self, tensor: RawTensor) -> tensor_pb2.Tensor:
        """The tensor as a message: by value if it is small, else by a ref to this shelf."""
        if len(tensor.data) <= self._inline_limit_bytes:
            return value_message(tensor)
        digest = digest_of(tensor.data)
        self._drop(digest)
        self._held[digest] = _Held(tensor.data, time.monotonic() + self._lifetime_s)
        self.size_bytes += len(tensor.data)
        self._make_room()
        return ref_message(
            RemoteTensor(tensor.element_type, tensor.shape, digest, self.address, time.time() + self._lifetime_s)
        )

    def get(self, digest: str) -> bytes:
        """The bytes behind a digest. Raises TensorNotFound."""
        held = self._held.get(digest)
        if held is None or held.expires_s < time.monotonic():
            raise TensorNotFound(digest[:64])
        return held.data

    def _drop(self, digest: str) -> None:
        held = self._held.pop(digest, None)
        self.size_bytes -= len(held.data) if held else 0

    def _make_room(self) -> None:
        now_s = time.monotonic()
        for digest in list(self._held):
            if self.size_bytes <= self._limit_bytes and self._held[digest].expires_s > now_s:
                break
            if len(self._held) > 1:
                self._drop(digest)


class TensorServicer(tensor_pb2_grpc.TensorServiceServicer):
    """TensorService over a shelf."""

    def __init__(self, shelf: TensorShelf) -> None:
        """Serves what `shelf` holds."""
        self._shelf = shelf

    async def Fetch(
        self, request: tensor_pb2.FetchRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[tensor_pb2.FetchResponse]:
        """Streams the bytes in chunks."""
        del context
        data = memoryview(self._shelf.get(request.digest))
        for start in range(0, len(data), CHUNK_BYTES):
            yield tensor_pb2.FetchResponse(chunk=bytes(data[start : start + CHUNK_BYTES]))


class TensorSource:
    """Gets at the bytes of received tensors, wherever they are."""

    def __init__(self, channels: Channels, shelf: TensorShelf, holders: Callable[[], set[str]]) -> None:
        """`holders`: addresses of the cluster's replicas; no other address is ever called."""
        self._channels, self._shelf, self._holders = channels, shelf, holders

    async def bring(self, name: str, tensor: RawTensor | RemoteTensor) -> RawTensor:
        """The tensor by value. Raises UnknownHolder, TensorNotFound, DigestMismatch, or Unavailable."""
        if isinstance(tensor, RawTensor):
            return tensor
        if tensor.holder_address == self._shelf.address:
            data = self._shelf.get(tensor.digest)
        elif tensor.holder_address in self._holders():
            data = await self._fetch(name, tensor)
        else:
            raise UnknownHolder(name)
        return check_size(name, RawTensor(tensor.element_type, tensor.shape, data))

    async def bring_all(self, tensors: Mapping[str, RawTensor | RemoteTensor]) -> dict[str, RawTensor]:
        """All of them, fetched side by side."""
        brought = await asyncio.gather(*(self.bring(name, tensor) for name, tensor in tensors.items()))
        return dict(zip(tensors, brought, strict=True))

    async def _fetch(self, name: str, tensor: RemoteTensor) -> bytes:
        stub = tensor_pb2_grpc.TensorServiceStub(self._channels.to(tensor.holder_address))
        chunks, size = [], 0
        call = stub.Fetch(tensor_pb2.FetchRequest(digest=tensor.digest), timeout=60.0)
        try:
            async for response in call:
                size += len(response.chunk)
                if size > tensor.size_bytes:
                    raise InvalidTensor(name, "is larger where it is held than its shape says")
                chunks.append(response.chunk)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, "tensor") or error from error
        finally:
            call.cancel()
        data = b"".join(chunks)
        if digest_of(data) != tensor.digest:
            raise DigestMismatch(tensor.digest)
        return data
