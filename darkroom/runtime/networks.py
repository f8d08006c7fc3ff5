"""NetworkService over a replica, and the calls that a replica's own pipelines make to it elsewhere."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Future

import grpc
import torch

from darkroom.errors import DeadlinePassed, Overloaded, StageUnavailable, Unavailable
from darkroom.models.networks import Held, call_network
from darkroom.models.program import Ticket
from darkroom.models.remote import OutsideCall, Reply
from darkroom.models.replica import StageReplica
from darkroom.models.tensors import to_raw, to_torch
from darkroom.policy.assignments import Assignments
from darkroom.policy.forecast import Wanted
from darkroom.policy.placement import Candidate, choose_replica
from darkroom.registry.announced import announced
from darkroom.registry.membership import ClusterView
from darkroom.registry.port import Member
from darkroom.runtime.channels import Channels
from darkroom.runtime.exchange import TensorShelf, TensorSource
from darkroom.runtime.server import time_left_s
from darkroom.v1 import network_pb2, network_pb2_grpc, tensor_pb2
from darkroom.wire.calls import NetworkCall, Tree, parse_call, parse_tree, tree_json
from darkroom.wire.status import from_rpc_error
from darkroom.wire.times import duration

_CALL_TIMEOUT_S = 120.0
_SUSPECT_S = 5.0
"""How long a replica that failed a call comes last: it may be listed until its lease ends."""


class NetworkCalls:
    """Both directions: serves calls to this replica's networks, and sends calls to those of others."""

    def __init__(
        self,
        replica: StageReplica,
        view: ClusterView,
        channels: Channels,
        shelf: TensorShelf,
        source: TensorSource,
        *,
        held: Callable[[str], Awaitable[Held]] | None = None,
    ) -> None:
        """Large tensors wait on `shelf` and are fetched through `source`.

        `held` gets what is called, by model id; None means the replica's parts of models.
        """
        self._held: Callable[[str], Awaitable[Held]] = held or replica.part
        self._replica, self._view, self._channels = replica, view, channels
        self._shelf, self._source = shelf, source
        self._loop = asyncio.get_running_loop()
        self._assignments = Assignments()
        self._suspect_until_s: dict[str, float] = {}

    async def serve(self, call: NetworkCall, deadline_s: float) -> Reply:
        """Runs a call here. `deadline_s` is on the clock of `time.monotonic`.

        Raises QueueFull, ModelNotFound, UnusableModel, NetworkNotHeld, InvalidCall or DeadlinePassed.
        """
        async with self._replica.accepted():
            part = await self._held(call.model_id)
            outside = OutsideCall(
                call.model_id, call.network, call.method, call.arguments.json, await self._bring(call.arguments)
            )
            ticket = Ticket(request_id=call.request_id, alone=call.deterministic, deadline_s=deadline_s)
            return await self._replica.run(lambda: call_network(part, outside), ticket)

    async def _bring(self, tree: Tree) -> dict[str, torch.Tensor]:
        return {name: to_torch(raw) for name, raw in (await self._source.bring_all(tree.tensors)).items()}

    def publish(self, tensors: Mapping[str, torch.Tensor]) -> list[tensor_pb2.NamedTensor]:
        """Tensors as they travel."""
        return [
            tensor_pb2.NamedTensor(name=name, tensor=self._shelf.publish(to_raw(tensor)))
            for name, tensor in tensors.items()
        ]

    def send(self, stage: str, call: OutsideCall) -> "Future[Reply]":
        """Calls a network at a replica of `stage`; for the engine's thread. The future raises what that raised."""
        return asyncio.run_coroutine_threadsafe(self._send(stage, call), self._loop)

    async def _send(self, stage: str, call: OutsideCall) -> Reply:
        """Tries replica after replica: those that are down, full, or slower than a call may take."""
        request = network_pb2.CallNetworkRequest(
            request_id=call.request_id,
            deterministic=call.alone,
            model_id=call.model_id,
            network=call.network,
            method=call.method,
            arguments_json=tree_json(call.arguments),
            tensors=self.publish(call.tensors),
        )
        wanted = Wanted(stage=stage, model_id=call.model_id, work=1.0, size_bytes=0.0)
        tried: list[str] = []
        failure: Unavailable | Overloaded | DeadlinePassed = StageUnavailable(stage, "none is up")
        while True:
            members = {member.replica_id: member for member in self._view.members(stage)}
            chosen = choose_replica([self._candidate(member, wanted) for member in members.values()], tried=tried)
            if chosen is None:
                raise failure
            tried.append(chosen.replica_id)
            member = members[chosen.replica_id]
            left_s = call.deadline_s - time.monotonic()
            if left_s <= 0:
                raise DeadlinePassed(stage)
            sent = self._assignments.send(announced(self._view, member, call.model_id), wanted, time.monotonic())
            try:
                return await self._ask(member.address, stage, request, left_s)
            except (Unavailable, DeadlinePassed) as error:
                failure = error
                self._suspect_until_s[chosen.replica_id] = time.monotonic() + _SUSPECT_S
            except Overloaded as error:
                failure = error
            finally:
                self._assignments.close(sent)

    def _candidate(self, member: Member, wanted: Wanted) -> Candidate:
        now_s = time.monotonic()
        is_suspect = self._suspect_until_s.get(member.replica_id, 0.0) > now_s
        said = announced(self._view, member, wanted.model_id)
        return self._assignments.candidate(said, wanted, now_s, is_suspect=is_suspect)

    async def _ask(self, address: str, stage: str, request: network_pb2.CallNetworkRequest, left_s: float) -> Reply:
        stub = network_pb2_grpc.NetworkServiceStub(self._channels.to(address))
        try:
            response = await stub.CallNetwork(request, timeout=min(left_s, _CALL_TIMEOUT_S))
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, stage) or error from error
        tree = parse_tree(request.network, response.answer_json, list(response.tensors))
        return Reply(tree.json, await self._bring(tree))


class NetworkServicer(network_pb2_grpc.NetworkServiceServicer):
    """Serves `NetworkCalls`."""

    def __init__(self, calls: NetworkCalls) -> None:
        self._calls = calls

    async def CallNetwork(
        self, request: network_pb2.CallNetworkRequest, context: grpc.aio.ServicerContext
    ) -> network_pb2.CallNetworkResponse:
        """Calls one network."""
        start_s = time.monotonic()
        reply = await self._calls.serve(parse_call(request), start_s + time_left_s(context))
        return network_pb2.CallNetworkResponse(
            answer_json=tree_json(reply.answer),
            tensors=self._calls.publish(reply.tensors),
            run_duration=duration(time.monotonic() - start_s),
        )
