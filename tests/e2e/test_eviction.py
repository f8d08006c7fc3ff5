"""What a running cluster's devices let go: the model asked for least, or, where the switch says so, by age."""

import shutil
from pathlib import Path

import pytest

from darkroom.client import Client, Drawing
from darkroom.runtime.cluster import ClusterConfig, LocalCluster
from darkroom.store.evicting import EvictionKind

_SHAPES = Path(__file__).parents[2] / "models" / "shapes"
_UNET = "unet/diffusion_pytorch_model.safetensors"
_WAIT_S = 120.0


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Three models of one size."""
    for name in ("often", "once", "last"):
        shutil.copytree(_SHAPES, tmp_path / "store" / name)
    return tmp_path / "store"


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "kept"), [("worth", {"often", "last"}), ("lru", {"once", "last"})])
async def test_a_cluster_keeps_what_is_asked_for_often_unless_told_to_go_by_age(
    store: Path, tmp_path: Path, kind: EvictionKind, kept: set[str]
) -> None:
    config = ClusterConfig(
        denoisers=1,
        model_store=store,
        default_model="often",
        device_budget_bytes=5 * (_SHAPES / _UNET).stat().st_size,  # two: stored in half precision, run in single
        eviction=kind,
        log_folder=tmp_path / "logs",
    )
    async with (
        LocalCluster(config) as cluster,
        Client(router_address=cluster.addresses.router, cachemgr_address=cluster.addresses.cachemgr) as client,
    ):
        for model_id in ("often", "often", "often", "once", "last"):
            drawing = Drawing(prompt="a red circle", model_id=model_id, seed=1, step_count=1)
            await client.draw(drawing, timeout_s=_WAIT_S)
        states = [report.state for report in await client.replicas() if report.state]
        (denoiser,) = [state for state in states if state.stage == 2]
        assert {model.model_id for model in denoiser.models} == kept
