"""Pipeline classes without a row: run apart from each other, or refused with the reason."""

import json
from pathlib import Path

import diffusers
import pytest
import structlog

from darkroom.errors import UnusableModel
from darkroom.families import FAMILIES, UNSUPPORTED
from darkroom.models.derived import NotDerivable, derived_family
from darkroom.models.loader import load_part
from tests.models.oracle import CPU, compare
from tests.tiny_models import save_tiny_model


@pytest.fixture
def store(tmp_path: Path) -> Path:
    save_tiny_model(tmp_path, "tiny-lcm")
    return tmp_path


def test_a_class_without_a_row_runs_and_shares_no_batch(store: Path) -> None:
    found = compare(store, "tiny-lcm")
    assert found.batched_share == 0
    assert found.batched_error == 0
    assert found.is_equal_alone
    assert found.prompt_effect > 1e-3
    assert found.pixel_difference <= 1


def test_a_class_without_a_row_is_loaded_with_a_warning(store: Path) -> None:
    with structlog.testing.capture_logs() as logs:
        part = load_part(store, "tiny-lcm", "denoiser", CPU)
    assert [log["log_level"] for log in logs] == ["warning"]
    assert logs[0]["pipeline"] == "LatentConsistencyModelPipeline"
    assert part.denoiser_names == ("unet",)
    assert not part.family.is_batched


@pytest.mark.parametrize(
    ("pipeline", "problem"),
    [
        ("DDPMPipeline", "its call takes no prompt_embeds"),
        ("StableCascadeDecoderPipeline", "its call takes no width and no height"),
        ("StableDiffusionUpscalePipeline", "its call takes no width and no height"),
        ("OmniGenPipeline", "OmniGenPipeline is not supported: it has no embeddings"),
        ("AutoencoderKL", "its pipeline class is none of diffusers"),
        ("os", "its pipeline class is none of diffusers"),
    ],
)
def test_a_class_that_cannot_be_split_is_refused_with_the_reason(store: Path, pipeline: str, problem: str) -> None:
    index = store / "tiny-lcm" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": pipeline}))
    with pytest.raises(UnusableModel, match=problem):
        load_part(store, "tiny-lcm", "denoiser", CPU)


@pytest.mark.parametrize("pipeline", FAMILIES)
def test_what_is_derived_from_a_class_agrees_with_its_row(pipeline: str) -> None:
    row = FAMILIES[pipeline]
    try:
        derived = derived_family(getattr(diffusers, pipeline))
    except NotDerivable as problem:
        pytest.fail(str(problem))
    assert set(derived.denoisers) <= set(row.denoisers)
    assert derived.encodings[0].returns == row.encodings[0].returns or pipeline in (
        "QwenImagePipeline",
        "AuraFlowPipeline",
    )


def test_unsupported_classes_have_no_row() -> None:
    assert not UNSUPPORTED.keys() & FAMILIES.keys()
    assert all(hasattr(diffusers, pipeline) for pipeline in UNSUPPORTED)
