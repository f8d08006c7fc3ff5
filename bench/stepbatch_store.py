"""Makes the model store of bench.stepbatch: two models of one architecture, LoRAs for each, embeddings of prompts."""

import json
import shutil
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from bench.stepbatch_mix import MODELS, PROMPT_COUNT, lora_ids
from bench.tasks import distinct_prompts
from tests.tiny_loras import diffusers_names, factors, is_attention, save_lora

for _logging in (diffusers.utils.logging, transformers.utils.logging):
    _logging.disable_progress_bar()
    _logging.set_verbosity_error()

EMBEDDINGS = "embeddings.safetensors"
NEGATIVE = "negative"
_WEIGHTS = Path("unet", "diffusion_pytorch_model.safetensors")
_PERTURBATION = 0.02
"""Of a tensor's own spread: another model to whoever compares weights, equally well-behaved."""
_RANK, _STRENGTH = 4, 0.05


def make_store(source: Path, store: Path) -> None:
    """Copies the model `source`, once as it is and once with its UNet's weights perturbed; makes the rest. Seeded."""
    for number, model_id in enumerate(MODELS):
        shutil.copytree(source, store / model_id)
        if number:
            _perturb(store / model_id / _WEIGHTS, seed=number)
        _save_loras(store, model_id)
    save_file(_embeddings(store / MODELS[0]), store / EMBEDDINGS)


def _perturb(path: Path, seed: int) -> None:
    noise = torch.Generator().manual_seed(seed)
    tensors = {
        name: value + _PERTURBATION * value.std() * torch.randn(value.shape, generator=noise)
        if value.is_floating_point() and value.numel() > 1
        else value
        for name, value in sorted(load_file(path).items())
    }
    save_file(tensors, path, metadata={"format": "pt"})


def _save_loras(store: Path, model_id: str) -> None:
    config = json.loads((store / model_id / "unet" / "config.json").read_text())
    network = UNet2DConditionModel.from_config(config)
    for seed, lora_id in enumerate(lora_ids(model_id)):
        pairs = factors(network, is_attention, rank=_RANK, seed=seed, strength=_STRENGTH)
        save_lora(store, lora_id, diffusers_names("unet", pairs), base_model=model_id)


@torch.inference_mode()
def _embeddings(folder: Path) -> dict[str, torch.Tensor]:
    """[1, T, D] by the prompt's number, and the empty prompt's."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    prompts = {str(number): prompt for number, prompt in enumerate(distinct_prompts(PROMPT_COUNT, seed=0))}
    return {
        name: pipeline.encode_prompt(prompt, "cpu", 1, do_classifier_free_guidance=False)[0].clone()
        for name, prompt in {**prompts, NEGATIVE: ""}.items()
    }
