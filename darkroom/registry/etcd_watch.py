"""Follows a prefix in etcd through lost connections, restarts, compactions and lost data.

The rule: whenever the stream ends, for whatever reason, it lists anew and follows from there. A revision reached before
proves nothing: what came next may be compacted, and an etcd that lost its data counts from 1 again.
etcd3aio's own watch is not used: it reconnects inside, at revisions that skip changes, and ends when the stream does.
"""

import asyncio
from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import aclosing
from typing import Any

import grpc.aio
from etcd3aio import prefix_range_end
from etcd3aio._protobuf import WatchCreateRequest, WatchRequest

from darkroom.errors import RegistryUnavailable
from darkroom.registry.etcd_connection import (
    CLIENT_ERRORS,
    EtcdConnection,
    decode_key,
    describe,
    raise_if_task_cancelled,
)

_RETRY_S = 0.2
"""Between two attempts while etcd is away."""
_SILENCE_S = 1.0
"""How long a stream may say nothing before it is asked for a sign of life. gRPC's own pings come later."""
_ANSWER_S = 2.0
"""How long that sign may take. Also the limit for every write to the stream."""

_REQUIRE_LEADER = (("hasleader", "true"),)
"""A member cut off from its cluster would otherwise keep the watch open and say nothing."""


async def watch_prefix(connection: EtcdConnection, prefix: str) -> AsyncGenerator[dict[str, bytes], None]:
    """Yields all that is under `prefix`: at once, then whenever it differs. Raises RegistryUnavailable once closed."""
    shown: dict[str, bytes] | None = None
    while True:
        try:
            async with aclosing(_states(connection, prefix)) as states:
                async for state in states:
                    if state != shown:
                        shown = state
                        yield dict(state)
        except RegistryUnavailable:
            connection.link()
        await asyncio.sleep(_RETRY_S)


async def _states(connection: EtcdConnection, prefix: str) -> AsyncGenerator[dict[str, bytes], None]:
    """Yields what is listed, then what each change makes of it. Raises RegistryUnavailable when cut off."""
    listing = await connection.list(prefix)
    state = listing.state
    yield state
    async with aclosing(_changes(connection, prefix, listing.revision + 1)) as changes:
        async for events in changes:
            state = _apply(state, events)
            yield state


def _apply(before: Mapping[str, bytes], events: Iterable[Any]) -> dict[str, bytes]:
    """What is true after `events`."""
    state = dict(before)
    for event in events:
        if event.type == event.DELETE:
            state.pop(decode_key(event.kv.key), None)
        else:
            state[decode_key(event.kv.key)] = bytes(event.kv.value)
    return state


async def _changes(connection: EtcdConnection, prefix: str, revision: int) -> AsyncGenerator[Iterable[Any], None]:
    """Yields the events from `revision` on. Raises RegistryUnavailable when the stream ends, for whatever reason."""
    link = connection.link()
    create = WatchCreateRequest(key=prefix.encode(), range_end=prefix_range_end(prefix), start_revision=revision)
    call = link.watch.Watch(metadata=_REQUIRE_LEADER)
    try:
        async with asyncio.timeout(_ANSWER_S):  # not wait_for, which before Python 3.12 can swallow a cancellation
            await call.write(WatchRequest(create_request=create))
        while True:
            response = await _next_response(call)
            if response is grpc.aio.EOF:
                raise RegistryUnavailable("watch: etcd ended the stream")
            if response.canceled or response.compact_revision:
                raise RegistryUnavailable(f"watch: etcd cancelled it: {_reason(response)}")
            if response.created and response.header.revision < revision - 1:
                raise RegistryUnavailable("watch: etcd is behind what it listed, or has lost it")
            if response.events:
                yield response.events
    except asyncio.CancelledError:
        raise_if_task_cancelled()
        raise RegistryUnavailable("watch: the client is closed") from None
    except CLIENT_ERRORS as error:
        connection.abandon(link)
        raise RegistryUnavailable(f"watch: {describe(error)}") from error
    finally:
        call.cancel()


def _reason(response: Any) -> str:
    """Why etcd cancelled a watch; it gives no reason of its own for a compaction."""
    if response.compact_revision:
        return f"compacted up to revision {response.compact_revision}"
    return str(response.cancel_reason)


async def _next_response(call: Any) -> Any:
    """The stream's next response. Raises TimeoutError if it does not even answer when asked for one.

    Progress is asked for as a sign of life only: before etcd 3.5.8 it may overtake events, so nothing is read from it.
    """
    read = asyncio.ensure_future(call.read())
    try:
        done, _ = await asyncio.wait({read}, timeout=_SILENCE_S)
        if not done:
            async with asyncio.timeout(_ANSWER_S):
                await call.write(WatchRequest(progress_request={}))
                await asyncio.wait({read})
        return read.result()
    finally:
        read.cancel()
        await asyncio.gather(read, return_exceptions=True)
