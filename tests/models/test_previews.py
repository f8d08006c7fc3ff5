"""Preview maps: what they draw, which files are refused, and which latents are worth showing."""

import io
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from PIL import Image

from darkroom.errors import UnusableModel
from darkroom.models.previews import FILE_NAME, PreviewMap, clean_estimate, load_map, save_map, unpack_patches
from tests.shipped import SHAPES
from tests.tiny_models import BETAS


@pytest.fixture
def colours() -> PreviewMap:
    """Channel 0 is red, channel 1 is blue; all zeros is a green of one fifth."""
    return PreviewMap(torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]), torch.tensor([0.0, 0.2, 0.0]))


def test_each_image_is_a_file_of_latent_size_in_the_colours_of_the_map(colours: PreviewMap) -> None:
    latents = torch.zeros(2, 2, 16, 24)
    latents[0, 0] = 1.0
    latents[1, 1, :, 12:] = 0.5
    files = colours.draw(latents)
    first, second = (np.asarray(Image.open(io.BytesIO(file)), dtype=int) for file in files)
    assert Image.open(io.BytesIO(files[0])).format == "JPEG"
    assert first.shape == second.shape == (16, 24, 3)
    assert np.abs(first - [255, 51, 0]).max() <= 3
    assert np.abs(second[:, 20:] - [0, 51, 128]).max() <= 3
    assert np.abs(second[:, :4] - [0, 51, 0]).max() <= 3


def test_pixels_are_rounded_clamped_and_never_undefined(colours: PreviewMap) -> None:
    latents = torch.tensor([0.5, 9.0, -9.0, float("nan"), float("inf"), float("-inf")]).reshape(1, 1, 1, 6)
    pixels = colours.pixels(torch.cat([latents, torch.zeros_like(latents)], 1).to(torch.bfloat16))
    assert pixels[0, 0, :, 0].tolist() == [128, 255, 0, 0, 255, 0]


def test_a_video_shows_its_middle_frame(colours: PreviewMap) -> None:
    latents = torch.zeros(1, 2, 5, 8, 8)
    latents[:, 0, 2] = 1.0
    assert colours.pixels(latents)[0, 0, 0].tolist() == [255, 51, 0]


def test_latents_of_another_model_are_refused(colours: PreviewMap) -> None:
    for shape in ((1, 4, 8, 8), (1, 64, 2)):
        with pytest.raises(ValueError, match="must be"):
            colours.draw(torch.zeros(shape))


def test_patches_are_unpacked_as_flux_does(colours: PreviewMap) -> None:
    latents = torch.randn(3, 2, 8, 12)
    packed = FluxPipeline._pack_latents(latents, 3, 2, 8, 12)
    assert torch.equal(unpack_patches(packed, 8, 12), latents)
    drawn = colours.draw(packed, lambda rows: unpack_patches(rows, 8, 12))
    assert drawn == colours.draw(latents)


def test_a_map_comes_back_from_its_file(tmp_path: Path) -> None:
    made = PreviewMap(torch.randn(16, 3), torch.randn(3))
    save_map(made, tmp_path)
    loaded = load_map(tmp_path)
    assert loaded is not None
    torch.testing.assert_close(loaded.weights, made.weights, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loaded.bias, made.bias, rtol=1e-5, atol=1e-6)
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


def test_a_model_without_a_map_has_no_previews(tmp_path: Path) -> None:
    assert load_map(tmp_path) is None


GOOD = {"format": 1, "weights": [[1, 0, 0]], "bias": [0, 0, 0]}


@pytest.mark.parametrize(
    "content",
    [
        "no JSON",
        "[" * 50_000,
        "[]",
        json.dumps(GOOD | {"format": 2}),
        json.dumps(GOOD | {"weights": []}),
        json.dumps(GOOD | {"weights": [[1, 0]]}),
        json.dumps(GOOD | {"weights": [[1, 0, "0"]]}),
        json.dumps(GOOD | {"weights": [[1, 0, True]]}),
        json.dumps(GOOD | {"weights": [[1, 0, float("nan")]]}),
        json.dumps(GOOD | {"weights": [[1, 0, 1e300]]}),
        json.dumps(GOOD | {"weights": [[1, 0, 10**400]]}),
        json.dumps(GOOD | {"weights": [[1, 0, 0]] * 257}),
        json.dumps(GOOD | {"bias": None}),
        json.dumps(GOOD) + " " * 70_000,
    ],
)
def test_a_file_that_is_no_map_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / FILE_NAME).write_text(content)
    with pytest.raises(UnusableModel, match=FILE_NAME):
        load_map(tmp_path)


def test_a_map_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).mkdir()
    with pytest.raises(UnusableModel, match="cannot be read"):
        load_map(tmp_path)


def test_the_shipped_map_fits_the_shipped_model() -> None:
    shipped = load_map(SHAPES)
    assert shipped is not None
    assert shipped.channel_count == json.loads((SHAPES / "vae" / "config.json").read_text())["latent_channels"]


@pytest.mark.parametrize(
    "solver",
    [
        DDIMScheduler(**BETAS, clip_sample=False),
        EulerDiscreteScheduler(**BETAS),
        DPMSolverMultistepScheduler(**BETAS),
        UniPCMultistepScheduler(**BETAS),
        FlowMatchEulerDiscreteScheduler(shift=3.0),
    ],
    ids=lambda solver: type(solver).__name__,
)
def test_with_the_true_noise_predicted_the_estimate_is_the_finished_latents(solver: Any) -> None:
    torch.manual_seed(0)
    clean, noise = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    solver.set_timesteps(8)
    is_flow = isinstance(solver, FlowMatchEulerDiscreteScheduler)
    for i, timestep in enumerate(solver.timesteps[:-1]):
        if is_flow:
            sample = (1 - solver.sigmas[i]) * clean + solver.sigmas[i] * noise
            predicted_noise = noise - clean
        else:
            sample, predicted_noise = solver.add_noise(clean, noise, timestep[None]), noise
        given = solver.scale_model_input(sample, timestep) if hasattr(solver, "scale_model_input") else sample
        assert given.shape == sample.shape
        answer = solver.step(predicted_noise, timestep, sample)
        predicted = getattr(answer, "pred_original_sample", None)
        shown = clean_estimate(solver, sample, answer.prev_sample, predicted)
        torch.testing.assert_close(shown, clean, rtol=2e-3, atol=2e-3)


def test_a_solver_without_an_estimate_shows_its_sample() -> None:
    solver = PNDMScheduler(**BETAS)
    solver.set_timesteps(8)
    sample = torch.randn(1, 4, 8, 8)
    after = solver.step(torch.randn_like(sample), solver.timesteps[0], sample).prev_sample
    assert clean_estimate(solver, sample, after, None) is after


def test_a_preview_is_quick() -> None:
    """A bound with room for a busy machine; the figures are in docs/benchmarks.md."""
    preview_map, latents = PreviewMap(torch.randn(16, 3) / 8, torch.full((3,), 0.5)), torch.randn(1, 16, 64, 64)
    times = []
    for _ in range(20):
        start_s = time.perf_counter()
        preview_map.draw(latents)
        times.append(time.perf_counter() - start_s)
    assert min(times) < 0.003
