"""Calls to etcd, each with a deadline, on the endpoint that last answered. The boundary where the client's errors end.

The rule: whatever etcd3aio, gRPC or the clock raises leaves here as RegistryUnavailable.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc.aio
from etcd3aio import EtcdConnectionError, EtcdError, prefix_range_end
from etcd3aio._protobuf import WatchStub
from etcd3aio.kv import KVService
from etcd3aio.lease import LeaseService

from darkroom.errors import RegistryUnavailable

T = TypeVar("T")

CLIENT_ERRORS = (EtcdError, grpc.aio.AioRpcError, TimeoutError, asyncio.InvalidStateError)
"""All that a call can raise; the last is gRPC's for writing to a stream that has ended."""

_CHANNEL_OPTIONS = (
    # etcd forbids pings closer than 5 s, or without a call in flight. gRPC's own time limit for an answer is a minute.
    ("grpc.keepalive_time_ms", 6_000),
    ("grpc.keepalive_timeout_ms", 2_000),
    ("grpc.http2.ping_timeout_ms", 2_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.keepalive_permit_without_calls", 0),
    # An etcd that is back is found within half a second.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_receive_message_length", 64 << 20),
)


@dataclass(frozen=True, slots=True)
class Listing:
    """All that was under a prefix at one revision."""

    state: dict[str, bytes]
    revision: int


class Link:
    """One endpoint's channel, and the client's services on it."""

    def __init__(self, endpoint: str) -> None:
        # Not etcd3aio's own channel: it takes no host names, and pings more than etcd allows.
        self.channel = grpc.aio.insecure_channel(endpoint, options=_CHANNEL_OPTIONS)
        self.kv = KVService(self.channel, max_attempts=1)
        self.lease = LeaseService(self.channel, max_attempts=1)
        self.watch: Any = WatchStub(self.channel)


class EtcdConnection:
    """Stays with one endpoint until it fails, then tries the next. Connects at the first call."""

    def __init__(self, endpoints: Sequence[str], *, deadline_s: float) -> None:
        if not endpoints:
            raise ValueError("endpoints must not be empty")
        self.deadline_s = deadline_s
        self._endpoints = tuple(endpoints)
        self._current = 0
        self._links: dict[int, Link] = {}
        self._is_closed = False

    def link(self) -> Link:
        """The link to the endpoint in use. Raises RegistryUnavailable once closed."""
        if self._is_closed:
            raise RegistryUnavailable("the client is closed")
        if self._current not in self._links:
            self._links[self._current] = Link(self._endpoints[self._current])
        return self._links[self._current]

    def abandon(self, link: Link) -> None:
        """Uses the next endpoint from now on, unless someone else has moved on from `link` already."""
        if link is self._links.get(self._current):
            self._current = (self._current + 1) % len(self._endpoints)

    async def call(self, what: str, use: Callable[[Link], Awaitable[T]]) -> T:
        """What `use` returns. Raises RegistryUnavailable, naming `what`."""
        link = self.link()
        try:
            async with asyncio.timeout(self.deadline_s):
                for _ in self._endpoints:
                    try:
                        return await use(link)
                    except EtcdConnectionError:
                        self.abandon(link)
                        link = self.link()
                return await use(link)
        except asyncio.CancelledError:
            raise_if_task_cancelled()
            raise RegistryUnavailable(f"{what}: the client is closed") from None
        except CLIENT_ERRORS as error:
            self.abandon(link)
            raise RegistryUnavailable(f"{what}: {describe(error)}") from error

    async def list(self, prefix: str) -> Listing:
        """All that is under `prefix`. Raises RegistryUnavailable."""
        end = prefix_range_end(prefix)
        answer: Any = await self.call("read", lambda link: link.kv.get(prefix, end))
        state = {decode_key(entry.key): bytes(entry.value) for entry in answer.kvs}
        return Listing(state, answer.header.revision)

    async def close(self) -> None:
        """Closes every channel; what is in flight fails."""
        self._is_closed = True
        for link in self._links.values():
            await link.channel.close()


def raise_if_task_cancelled() -> None:
    """Raises CancelledError if the running task was cancelled, and not only the call it waits for, by closing."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


def decode_key(key: bytes) -> str:
    """The key as text. One that is no UTF-8 is nobody's of ours and must only not stop the reader."""
    return key.decode(errors="replace")


def describe(error: BaseException) -> str:
    """The error in a few words."""
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name} {error.details()}"
    return str(error) or ("no answer in time" if isinstance(error, TimeoutError) else type(error).__name__)
