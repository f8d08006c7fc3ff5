"""The registry port on etcd. Usable while etcd is down: calls raise RegistryUnavailable, watches wait."""

from collections.abc import AsyncGenerator, Sequence
from typing import Any

import grpc
import grpc.aio
from etcd3aio.kv import KVService

from darkroom.errors import Deposed
from darkroom.registry.etcd_connection import EtcdConnection, Link
from darkroom.registry.etcd_watch import watch_prefix
from darkroom.registry.port import Claim, Guard, LeaseId, Revision


class EtcdRegistry:
    """A registry in etcd. Belongs to the event loop of its first call."""

    def __init__(self, endpoints: Sequence[str], *, deadline_s: float = 3.0) -> None:
        """`endpoints` are host:port, names or addresses; every call is given up after `deadline_s`."""
        self._connection = EtcdConnection(endpoints, deadline_s=deadline_s)

    async def read(self, prefix: str) -> dict[str, bytes]:
        """Every key that starts with `prefix`."""
        return (await self._connection.list(prefix)).state

    async def put(self, key: str, value: bytes, *, lease: LeaseId | None = None, guard: Guard | None = None) -> None:
        """Writes the key, under this lease and no longer under another."""
        if guard is None:
            await self._connection.call("put", lambda link: link.kv.put(key, value, lease=lease or 0))
        else:
            await self._guarded("put", guard, KVService.txn_op_put(key, value, lease=lease or 0))

    async def delete(self, key: str, *, guard: Guard | None = None) -> None:
        """Removes the key if it is there."""
        if guard is None:
            await self._connection.call("delete", lambda link: link.kv.delete(key))
        else:
            await self._guarded("delete", guard, KVService.txn_op_delete(key))

    async def claim(self, key: str, value: bytes, *, lease: LeaseId) -> Claim:
        """Writes the key unless it is there, in one transaction."""
        is_vacant = KVService.txn_compare_create_revision(key, 0)
        put, get = KVService.txn_op_put(key, value, lease=lease), KVService.txn_op_get(key)
        answer: Any = await self._connection.call("claim", lambda link: link.kv.txn([is_vacant], [put], [get]))
        if answer.succeeded:
            return Claim(value=value, created=Revision(answer.header.revision))
        found = answer.responses[0].response_range.kvs[0]
        return Claim(value=bytes(found.value), created=Revision(found.create_revision))

    async def _guarded(self, what: str, guard: Guard, operation: Any) -> None:
        holds = KVService.txn_compare_create_revision(guard.key, guard.created)
        answer: Any = await self._connection.call(what, lambda link: link.kv.txn([holds], [operation]))
        if not answer.succeeded:
            raise Deposed(str(guard.created))

    async def grant(self, ttl_s: int) -> LeaseId:
        """A new lease. etcd makes a short one longer: at least 1.5 of its election timeouts."""
        answer: Any = await self._connection.call("grant", lambda link: link.lease.grant(ttl_s))
        return LeaseId(answer.ID)

    async def keep_alive(self, lease: LeaseId) -> float:
        """Seconds the lease has from now on; 0 if it has ended."""
        return await self._connection.call("keep_alive", lambda link: _keep_alive_once(link, lease))

    async def revoke(self, lease: LeaseId) -> None:
        """Ends the lease now, with its keys."""
        await self._connection.call("revoke", lambda link: _revoke(link, lease))

    def watch(self, prefix: str) -> AsyncGenerator[dict[str, bytes], None]:
        """Yields all that is under `prefix`: at once, then whenever it differs."""
        return watch_prefix(self._connection, prefix)

    async def close(self) -> None:
        """Closes the connection for good."""
        await self._connection.close()


async def _keep_alive_once(link: Link, lease: LeaseId) -> float:
    call = link.lease.keep_alive(lease)
    try:
        answer: Any = await call.read()
    finally:
        call.cancel()
    if answer is grpc.aio.EOF:
        raise TimeoutError("etcd ended the stream without an answer")
    return float(max(answer.TTL, 0))


async def _revoke(link: Link, lease: LeaseId) -> None:
    try:
        await link.lease.revoke(lease)
    except grpc.aio.AioRpcError as error:
        if error.code() != grpc.StatusCode.NOT_FOUND:
            raise
