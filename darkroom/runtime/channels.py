"""gRPC channels to other replicas, one per address, with the limits and keepalive that both ends share.

`grpc.http2.ping_timeout_ms` is what makes a stopped peer noticed: with keepalive alone it takes a minute.
"""

import grpc

MAX_MESSAGE_BYTES = 32 << 20
"""Images of a request travel in one message: ten of 1024 x 1024 as PNG fit."""

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

    def to(self, address: str) -> grpc.aio.Channel:
        """The channel to `host:port`, opened on first use."""
        if address not in self._open:
            self._open[address] = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        return self._open[address]

    async def keep_only(self, addresses: set[str]) -> None:
        """Closes channels to replicas that are gone."""
        for address in [a for a in self._open if a not in addresses]:
            await self._open.pop(address).close(grace=1.0)

    async def close(self) -> None:
        """Closes all channels."""
        await self.keep_only(set())
