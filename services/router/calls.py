"""How the router calls stages: what every call of a request shares, and the port."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from darkroom.wire.graphs import Node
from services.router.attempts import Attempts
from services.router.values import Answer, Value


@dataclass(frozen=True, slots=True, kw_only=True)
class CallSettings:
    """What every call of a request shares."""

    request_id: str
    deterministic: bool
    deadline_s: float
    """On the event loop's clock."""
    priority: int = 0
    tenant: str = ""

    def timeout_s(self) -> float:
        """Seconds left."""
        return max(0.0, self.deadline_s - asyncio.get_running_loop().time())


class Preparation(Enum):
    """What came of asking a replica to load."""

    LOADED = "loaded"
    FOUND = "found"
    """It had it, or was loading it."""
    UNHEARD = "unheard"
    """It knows no such call, or failed at it by a bug of its own."""


class Stages(Protocol):
    """How a replica is called."""

    async def call(
        self, address: str, node: Node, inputs: Mapping[str, Value], settings: CallSettings, attempts: Attempts
    ) -> Answer:
        """Runs the node's work at `address`, and tells `attempts` what it hears of it."""
        ...

    async def prepare(self, address: str, node: Node, settings: CallSettings) -> Preparation:
        """Returns once the replica at `address` has what the node needs. Raises DarkroomError."""
        ...
