"""Neighbours per test: each starts the replicas it needs."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.services.neighbours import Neighbours


@pytest.fixture
async def neighbours(tiny_store: Path) -> AsyncIterator[Neighbours]:
    """A place for replicas that see each other."""
    async with Neighbours(tiny_store) as started:
        yield started
