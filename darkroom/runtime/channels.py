"""gRPC channels to other replicas, one per address, with the limits and keepalive that both ends share.

`grpc.http2.ping_timeout_ms` is what makes a stopped peer noticed: with keepalive alone it takes a minute.
"""

import asyncio

import grpc

from darkroom.registry.membership import ClusterView

MAX_MESSAGE_BYTES = 32 << 20
"""Images of a request travel in one message: ten of 1024 x 1024 as PNG fit."""

_LAST_CALL_S = 3600.0
"""How long calls to a replica that has left may go on: it drains, and bounds them itself."""

_SIZES = [("grpc.max_receive_message_length", MAX_MESSAGE_BYTES), ("grpc.max_send_message_length", MAX_MESSAGE_BYTES)]
CHANNEL_OPTIONS = [
    *_SIZES,
    ("grpc.keepalive_time_ms", 1000),
    ("grpc.keepalive_timeout_ms", 1000),
    ("grpc.http2.ping_timeout_ms", 1000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.enable_retries", 0),
]


def server_options(max_request_bytes: int) -> list[tuple[str, int]]:
    """Options of a server that takes requests of up to `max_request_bytes`."""
    return [
        ("grpc.max_receive_message_length", max_request_bytes),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.so_reuseport", 0),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 500),
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.keepalive_permit_without_calls", 1),
    ]


class Channels:
    """Open channels by address."""

    def __init__(self) -> None:
        self._open: dict[str, grpc.aio.Channel] = {}
        self._closing: set[asyncio.Task[None]] = set()

    @property
    def addresses(self) -> set[str]:
        """Where channels are open to."""
        return set(self._open)

    def to(self, address: str) -> grpc.aio.Channel:
        """The channel to `host:port`, opened on first use."""
        if address not in self._open:
            self._open[address] = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        return self._open[address]

    async def follow(self, view: ClusterView) -> None:
        """Closes channels to replicas that have left, until cancelled. Calls that still run there may finish."""
        known: set[str] = set()
        while True:
            await view.wait_for(lambda now: _addresses(now) != known)  # noqa: B023 - asked only until it returns
            known = _addresses(view)
            for address in self.addresses - known:
                closing = asyncio.create_task(self._open.pop(address).close(grace=_LAST_CALL_S))
                self._closing.add(closing)
                closing.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        """Closes all channels, and ends the calls on them."""
        for closing in self._closing:
            closing.cancel()
        await asyncio.gather(*(channel.close() for channel in self._open.values()))
        self._open.clear()


def _addresses(view: ClusterView) -> set[str]:
    return {member.address for member in view.members()}
