"""Fixtures shared by every test: model stores made once per run."""

import asyncio
from pathlib import Path

import pytest


def pytest_configure() -> None:
    """Leaves pytest-asyncio no event loop to keep: else it makes one, which the first `asyncio.run` drops unclosed."""
    asyncio.set_event_loop(None)


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model store with one tiny random-weight model per row of the family table."""
    from tests.tiny_models import TINY_MODELS, save_tiny_model  # noqa: PLC0415 - imports torch, which most tests do without

    root = tmp_path_factory.mktemp("models")
    for model_id in TINY_MODELS:
        save_tiny_model(root, model_id)
    return root
