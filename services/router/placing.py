"""Which replica a node goes to: by what each announces, what this router has sent there, and who failed lately."""

import asyncio
from collections.abc import Collection

import structlog

from darkroom.policy.assignments import Announced, Assignments
from darkroom.policy.forecast import Wanted
from darkroom.policy.placement import Candidate, choose_replica
from darkroom.policy.worth import Tier
from darkroom.registry.announced import announced, nearest_tier
from darkroom.registry.membership import ClusterView
from darkroom.registry.parts import stage_bytes
from darkroom.registry.port import Member
from darkroom.wire.graphs import DenoiseWork, Node

_SUSPECT_S = 5.0  # as long as a dead replica's lease may live on
_log = structlog.get_logger()


class Placing:
    """The replicas in `view`, as one router knows them."""

    def __init__(self, view: ClusterView) -> None:
        self.view, self.assignments = view, Assignments()
        self._suspect_until_s: dict[str, float] = {}

    def untried(self, stage: str, tried: Collection[str]) -> list[Member]:
        """The stage's replicas but those."""
        return [member for member in self.view.members(stage) if member.replica_id not in tried]

    def choose(self, node: Node, tried: Collection[str], *, is_ahead: bool = False) -> Member | None:
        """The one that will be done first; None if all were tried. `is_ahead`: of a node whose turn is to come."""
        wanted = self.wanted(node)
        by_id = {member.replica_id: member for member in self.untried(node.stage, tried)}
        chosen = choose_replica([self._candidate(member, wanted, is_ahead=is_ahead) for member in by_id.values()])
        if chosen is None:
            return None
        _log.debug("placed", stage=node.stage, replica=chosen.replica_id, why=chosen.reason, is_ahead=is_ahead)
        return by_id[chosen.replica_id]

    def said(self, member: Member, node: Node) -> Announced:
        """What a replica announces that matters to a node."""
        return announced(self.view, member, node.work.model_id)

    def has_all(self, member: Member, node: Node) -> bool:
        """Whether a replica has the node's model and ControlNets on its device."""
        needed = [node.work.model_id]
        if isinstance(node.work, DenoiseWork):
            needed += [use.controlnet_id for use in node.work.conditions.controls]
        residences = self.view.residences_of(member.replica_id)
        return all(nearest_tier(member, residences.get(each)) is Tier.DEVICE for each in needed)

    def wanted(self, node: Node) -> Wanted:
        """What a node asks of a replica."""
        entry = self.view.model(node.work.model_id)
        size_bytes = stage_bytes(entry)[node.stage] if entry else 0.0
        return Wanted(stage=node.stage, model_id=node.work.model_id, work=work_of(node), size_bytes=size_bytes)

    def suspect(self, replica_id: str) -> None:
        """A call to it failed: it comes last for a while."""
        now_s = asyncio.get_running_loop().time()
        self._suspect_until_s = {other: until_s for other, until_s in self._suspect_until_s.items() if until_s > now_s}
        self._suspect_until_s[replica_id] = now_s + _SUSPECT_S

    def fetching_beside(self, member: Member, node: Node) -> list[str]:
        """The stage's replicas on the same machine that would have to fetch the node's model from the store, too."""
        return [
            other.replica_id
            for other in self.view.members(node.stage)
            if other.machine == member.machine and self.said(other, node).tier is Tier.REMOTE
        ]

    def _candidate(self, member: Member, wanted: Wanted, *, is_ahead: bool) -> Candidate:
        now_s = asyncio.get_running_loop().time()
        is_suspect = self._suspect_until_s.get(member.replica_id, 0.0) > now_s
        said = announced(self.view, member, wanted.model_id)
        return self.assignments.candidate(said, wanted, now_s, is_suspect=is_suspect, is_ahead=is_ahead)


def work_of(node: Node) -> float:
    """How much work a node is: steps of megapixels for a denoiser, else 1."""
    match node.work:
        case DenoiseWork() as work:
            return work.step_count * work.image_count * work.width_px * work.height_px / 1e6
        case _:
            return 1.0
