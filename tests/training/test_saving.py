"""What a training saves: half the bytes, float32 when loaded, the same picture."""

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline

from tests.training.tiny import tiny_shapes
from training.evaluate import easy_scenes, generate, load, model_defaults
from training.saving import save_pipeline


def test_a_saved_model_draws_the_same_picture_in_plain_diffusers(tmp_path: Path) -> None:
    pipe, folder = tiny_shapes(), tmp_path / "model"
    folder.mkdir()
    (folder / "README.md").write_text("a card")
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.half().float()  # as what is stored
    save_pipeline(pipe, folder, steps=2, guidance=3.0)
    loaded, scenes = load(folder), easy_scenes(1)
    assert isinstance(loaded, StableDiffusionPipeline)
    assert loaded.unet.dtype == loaded.text_encoder.dtype == pipe.unet.dtype == torch.float32
    pictures = [generate(p, scenes, **model_defaults(folder)) for p in (pipe, loaded)]
    assert np.array_equal(pictures[0], pictures[1])
    assert (folder / "README.md").read_text() == "a card"
    assert not json.loads((folder / "model_index.json").read_text())["requires_safety_checker"]
    size_bytes = (folder / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert size_bytes < 2.1 * sum(p.numel() for p in pipe.unet.parameters())
