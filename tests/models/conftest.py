"""What tests of programs share: an executor, and a second one that stands for the other stages' replicas."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from darkroom.models.executor import Executor
from tests.models.variant_runs import Elsewhere


@pytest.fixture
def executor() -> Iterator[Executor]:
    """One that has learned nothing yet."""
    executor = Executor(max_batch_rows=16)
    yield executor
    executor.close()


@pytest.fixture
def elsewhere(store: Path) -> Iterator[Elsewhere]:
    """Over the models of the test's own `store`."""
    away = Elsewhere(store)
    yield away
    away.executor.close()
