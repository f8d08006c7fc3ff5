"""Raw calls to every port of a cluster, and requests to make hostile."""

import re
import time
from dataclasses import dataclass
from typing import Any

import grpc

from darkroom.client import Client
from darkroom.errors import DarkroomError
from darkroom.runtime.channels import Channels
from darkroom.runtime.cluster import LocalCluster
from darkroom.v1 import (
    cachemgr_pb2,
    denoiser_pb2,
    encoder_pb2,
    graph_pb2,
    router_pb2,
    tensor_pb2,
    vae_pb2,
)
from darkroom.wire.status import from_rpc_error

AT_ONCE_S = 2.0
"""The rule is 100 ms on a machine that has nothing else to do; here others may run beside it."""
INTERNAL = re.compile(
    r"Traceback|\.py\b|\b[A-Z]\w+(Error|Exception|Pipeline)\b|(/\w+){2}|site-packages|torch|0x[0-9a-f]{6}"
)
MODEL, SIZE_PX, WIDTH = "tiny-sd", 32, 32
FLOAT32 = tensor_pb2.ELEMENT_TYPE_FLOAT32
LATENTS = tensor_pb2.Tensor(element_type=FLOAT32, shape=[1, 4, 16, 16], data=bytes(4096))
EMBEDDING = tensor_pb2.Tensor(element_type=FLOAT32, shape=[1, 8, WIDTH], data=bytes(4 * 8 * WIDTH))
NANS = b"\x00\x00\xc0\x7f"
SERVICES = {
    "router": (router_pb2, "RouterService"),
    "cachemgr": (cachemgr_pb2, "CacheManagerService"),
    "encoder": (encoder_pb2, "EncoderService"),
    "denoiser": (denoiser_pb2, "DenoiserService"),
    "vae": (vae_pb2, "VaeService"),
}
INVALID = grpc.StatusCode.INVALID_ARGUMENT


@dataclass(frozen=True, slots=True)
class Answer:
    """How a call ended, and how soon."""

    error: grpc.aio.AioRpcError | None
    after_s: float

    def check_refused(self, code: grpc.StatusCode, reason: str, *named: str) -> None:
        """Refused so, at once, in words that name these and nothing internal."""
        assert self.error is not None, "it was not refused"
        error = from_rpc_error(self.error, "router")
        assert self.error.code() is code, self.error.details()
        assert isinstance(error, DarkroomError)
        assert error.reason() == reason
        for name in named:
            assert name in error.message
        assert not INTERNAL.search(error.message), error.message
        assert len(error.message) < 1000
        assert self.after_s < AT_ONCE_S


class Ports:
    """Raw calls to every service of a cluster."""

    def __init__(self, cluster: LocalCluster) -> None:
        self._addresses = {"router": cluster.addresses.router, "cachemgr": cluster.addresses.cachemgr}
        self._channels = Channels()

    async def find_stages(self, client: Client) -> None:
        """Learns where the stages listen."""
        for report in await client.replicas():
            self._addresses[report.listed.replica_id.split("-")[0]] = report.listed.address

    async def send(
        self, service: str, method: str, raw: bytes, *, timeout_s: float = 30.0, metadata: Any = None
    ) -> Answer:
        """Sends bytes to `package.Service/Method`."""
        call: Any = self._channels.to(self._addresses[service]).unary_stream(f"/darkroom.v1.{method}")
        start_s = time.monotonic()
        try:
            async for _ in call(raw, timeout=timeout_s, metadata=metadata):
                pass
        except grpc.aio.AioRpcError as error:
            return Answer(error, time.monotonic() - start_s)
        return Answer(None, time.monotonic() - start_s)

    async def close(self) -> None:
        """Closes the connections."""
        await self._channels.close()


async def open_ports(cluster: LocalCluster, client: Client) -> Ports:
    """Every port of the cluster."""
    opened = Ports(cluster)
    await opened.find_stages(client)
    return opened


def generate_request(**changes: Any) -> bytes:
    good = {"model_id": MODEL, "prompt": "a ring", "step_count": 1, "seed": 1}
    return router_pb2.GenerateRequest(**{**good, **changes}).SerializeToString()


def encode_request(**changes: Any) -> bytes:
    return encoder_pb2.EncodeRequest(**{"model_id": MODEL, "prompt": "a ring", **changes}).SerializeToString()


def denoise_request(*embeddings: tensor_pb2.NamedTensor, **changes: Any) -> bytes:
    good = {
        "model_id": MODEL, "width_px": SIZE_PX, "height_px": SIZE_PX, "step_count": 1, "guidance_scale": 1.0,
        "image_count": 1, "embeddings": embeddings or [named("prompt_embeds", EMBEDDING)],
    }  # fmt: skip
    return denoiser_pb2.DenoiseRequest(**{**good, **changes}).SerializeToString()


def decode_request(**changes: Any) -> bytes:
    good = {
        "model_id": MODEL, "width_px": SIZE_PX, "height_px": SIZE_PX, "latents": LATENTS,
        "format": vae_pb2.IMAGE_FORMAT_PNG,
    }  # fmt: skip
    return vae_pb2.DecodeRequest(**{**good, **changes}).SerializeToString()


def graph_request(nodes: list[graph_pb2.Node], *edges: tuple[str, str, str, str]) -> bytes:
    connected = [graph_pb2.Edge(from_node=a, from_port=b, to_node=c, to_port=d) for a, b, c, d in edges]
    return router_pb2.RunGraphRequest(graph=graph_pb2.Graph(nodes=nodes, edges=connected)).SerializeToString()


def named(name: str, tensor: tensor_pb2.Tensor) -> tensor_pb2.NamedTensor:
    return tensor_pb2.NamedTensor(name=name, tensor=tensor)


def tensor(shape: list[int], data: bytes, element_type: Any = FLOAT32) -> tensor_pb2.Tensor:
    return tensor_pb2.Tensor(element_type=element_type, shape=shape, data=data)
