"""Asks a service whether it serves, for container health checks: `python -m darkroom.runtime.health host:port`.

Exit codes: 0 it says SERVING, 1 it does not, 2 wrong usage.
"""

import sys
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

_TIMEOUT_S = 2.0


def is_serving(address: str) -> bool:
    """Whether the server at `host:port` says within two seconds that all its services serve."""
    with grpc.insecure_channel(address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        try:
            answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=_TIMEOUT_S)
        except grpc.RpcError:
            return False  # nobody listens, or nobody answers
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def main() -> int:
    """The command; returns its exit code."""
    match sys.argv[1:]:
        case [address]:
            return 0 if is_serving(address) else 1
        case _:
            sys.stderr.write("usage: python -m darkroom.runtime.health host:port\n")
            return 2


if __name__ == "__main__":
    sys.exit(main())
