"""Fixtures shared by every test: model stores made once per run."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model store with one tiny random-weight model per row of the family table."""
    from tests.tiny_models import TINY_MODELS, save_tiny_model  # noqa: PLC0415 - imports torch, which most tests do without

    root = tmp_path_factory.mktemp("models")
    for model_id in TINY_MODELS:
        save_tiny_model(root, model_id)
    return root
