"""Wires the router together: `python -m services.router`."""

import asyncio
import secrets

from darkroom.registry.etcd import EtcdRegistry
from darkroom.registry.membership import ClusterView, Registration
from darkroom.registry.port import Member
from darkroom.runtime.channels import MAX_MESSAGE_BYTES, Channels
from darkroom.runtime.config import read_config
from darkroom.runtime.logs import configure_logs
from darkroom.runtime.server import Mounted, Server
from darkroom.v1 import router_pb2_grpc
from services.router.config import RouterConfig
from services.router.running import GraphRunner
from services.router.server import RouterServicer
from services.router.stages import GrpcStages
from services.router.usage import GrpcManagers, UsageReporter

_MAX_REQUEST_BYTES = MAX_MESSAGE_BYTES


async def main(config: RouterConfig) -> None:
    """Serves until SIGTERM."""
    replica_id = f"router-{secrets.token_hex(4)}"
    configure_logs("router", replica_id, level=config.log_level)
    registry = EtcdRegistry(config.etcd)
    view = ClusterView(registry)
    channels = Channels()
    server = Server(
        address=config.address,
        replica_id=replica_id,
        reflect=config.reflection,
        max_request_bytes=_MAX_REQUEST_BYTES,
        drain_s=config.drain_s,
    )
    registration = Registration(
        registry, Member(replica_id=replica_id, stage="router", address=f"{config.advertise_host}:{server.port}")
    )
    usage = UsageReporter(replica_id, view, GrpcManagers(channels))
    runner = GraphRunner(
        view,
        GrpcStages(channels),
        replica_wait_s=config.replica_wait_s,
        max_running=config.max_running,
        prepares_stages=config.prepares_stages,
        on_used=usage.add,
    )
    servicer = RouterServicer(
        runner, view, default_model=config.default_model, default_deadline_s=config.default_deadline_s
    )
    await server.start(
        [
            Mounted(
                lambda grpc_server: router_pb2_grpc.add_RouterServiceServicer_to_server(servicer, grpc_server),
                "darkroom.v1.RouterService",
            )
        ]
    )
    background = [view.run(), registration.run(), channels.follow(view), usage.run(lambda: runner.running)]
    await server.run(background, on_drain=[registration.leave])
    await channels.close()
    await registry.close()


if __name__ == "__main__":
    asyncio.run(main(read_config(RouterConfig, program="router")))
