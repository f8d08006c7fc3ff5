"""Wires the cache manager together: `python -m services.cachemgr`."""

import asyncio
import secrets
import time

from darkroom.registry.etcd import EtcdRegistry
from darkroom.registry.listing import Listings
from darkroom.registry.membership import ClusterView, Registration
from darkroom.registry.port import Member
from darkroom.runtime.config import read_config
from darkroom.runtime.logs import configure_logs
from darkroom.runtime.server import Mounted, Server
from darkroom.store.evicting import Eviction
from darkroom.store.opening import open_source
from darkroom.v1 import cachemgr_pb2_grpc
from services.cachemgr.cataloguing import keep_catalogue
from services.cachemgr.config import CacheManagerConfig
from services.cachemgr.manager import CacheManager
from services.cachemgr.server import CacheManagerServicer

_MAX_REQUEST_BYTES = 1 << 20


async def main(config: CacheManagerConfig) -> None:
    """Serves until SIGTERM."""
    replica_id = f"cachemgr-{secrets.token_hex(4)}"
    configure_logs("cachemgr", replica_id, level=config.log_level)
    registry = EtcdRegistry(config.etcd)
    view = ClusterView(registry)
    server = Server(
        address=config.address,
        replica_id=replica_id,
        reflect=config.reflection,
        max_request_bytes=_MAX_REQUEST_BYTES,
        drain_s=config.drain_s,
    )
    registration = Registration(
        registry, Member(replica_id=replica_id, stage="cachemgr", address=f"{config.advertise_host}:{server.port}")
    )
    eviction = Eviction()
    manager = CacheManager(replica_id, registry, view, config, clock=time.time, on_pins=eviction.pin)
    servicer = CacheManagerServicer(manager)
    await server.start(
        [
            Mounted(
                lambda grpc_server: cachemgr_pb2_grpc.add_CacheManagerServiceServicer_to_server(servicer, grpc_server),
                "darkroom.v1.CacheManagerService",
            )
        ]
    )
    source = open_source(config.model_store, config.store_cache, config.store_cache_bytes, eviction=eviction)
    listings = Listings(source)
    catalogue = keep_catalogue(manager.election, listings, interval_s=config.scan_interval_s)
    await server.run(
        [view.run(), registration.run(), catalogue, *manager.background()],
        on_drain=[manager.election.resign, registration.leave],
    )
    listings.close()
    await registry.close()


if __name__ == "__main__":
    asyncio.run(main(read_config(CacheManagerConfig, program="cachemgr")))
