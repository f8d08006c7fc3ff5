"""Trains LoRAs (Hu et al. 2021, arXiv 2106.09685) that paint what `shapes` or `shapes-dit` draws in another style.

Nobody has to ask for the style: captions stay as they are, the LoRA alone changes how things look. Saved in diffusers'
LoRA format, half precision.

    python -m training.lora --model models/shapes --style outline --out models/shapes-outline
"""

import argparse
import copy
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, FluxPipeline, StableDiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from torch import nn

from training.denoiser import loose_captions, velocity_loss
from training.descent import Descent, Plan
from training.dit import Conditions, flow_loss
from training.evaluate import load
from training.latents import Latents, load_latents
from training.saving import let_all_read, say_base
from training.scenes import STYLES
from training.text import embed

RANK = 8
_LIMIT_S = {"outline": 800, "stripes": 1700, "shadow": 300}
"""CPU seconds that a style takes to be learned."""
_UNET_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "conv1", "conv2"]
_TRANSFORMER_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_mlp", "proj_out"]


class LoraTraining:
    """A LoRA in training on a frozen pipeline, which is left as it was."""

    def __init__(
        self, pipe: DiffusionPipeline, style: str, data: Latents, plan: Plan, *, folder: Path | None = None
    ) -> None:
        torch.manual_seed(10)
        self._pipe, self._data, self._is_unet = pipe, data, isinstance(pipe, StableDiffusionPipeline)
        base = pipe.unet if self._is_unet else pipe.transformer
        self._network = copy.deepcopy(base).requires_grad_(requires_grad=False).train()
        targets = _UNET_TARGETS if self._is_unet else _TRANSFORMER_TARGETS
        self._network.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets))
        self._embed = _embedder(pipe)
        name = f"lora-{style}" if self._is_unet else f"lora-dit-{style}"
        self.descent = Descent(name, {"network": self._network}, plan, seed=10, folder=folder)

    def loss(self, batch: int) -> torch.Tensor:
        """The base's own loss, on pictures of the style."""
        scenes, latent_BCHW = self._data.take(batch, self.descent.rng)
        return self._embed(self._network, latent_BCHW, loose_captions(scenes, self.descent.rng))

    def run(self, *, batch: int = 32) -> list[float]:
        """Trains until the plan ends. Returns the loss of each step."""
        return self.descent.run(lambda: self.loss(batch))

    def save(self, folder: Path, *, base: str) -> None:
        """Writes the average in diffusers' LoRA format. `base`: id of the model that it is made for."""
        learned = get_peft_model_state_dict(self.descent.averaged("network"))
        layers = {name: tensor.half() for name, tensor in learned.items()}
        if self._is_unet:
            StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers)
        else:
            FluxPipeline.save_lora_weights(folder, transformer_lora_layers=layers)
        say_base(folder, base)
        let_all_read(folder)


def _embedder(pipe: DiffusionPipeline) -> Callable[[nn.Module, torch.Tensor, list[str]], torch.Tensor]:
    """The loss of a network on latents and their captions, by the kind of pipeline."""
    if isinstance(pipe, StableDiffusionPipeline):

        def of_unet(unet: nn.Module, latent_BCHW: torch.Tensor, texts: list[str]) -> torch.Tensor:
            return velocity_loss(unet, latent_BCHW, embed(pipe.tokenizer, pipe.text_encoder, texts))

        return of_unet
    conditions = Conditions(pipe, pipe.tokenizer_2, pipe.text_encoder_2.requires_grad_(requires_grad=False))

    def of_transformer(transformer: nn.Module, latent_BCHW: torch.Tensor, texts: list[str]) -> torch.Tensor:
        return flow_loss(transformer, latent_BCHW, conditions.of(texts))

    return of_transformer


def main() -> None:
    """Trains one LoRA and saves it."""
    parser = argparse.ArgumentParser(prog="python -m training.lora", description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("models/shapes"))
    parser.add_argument("--style", choices=STYLES[1:], required=True)
    parser.add_argument("--folder", type=Path, default=Path("out/training"), help="where the state of trainings is")
    parser.add_argument("--limit-s", type=float, help="CPU seconds of the whole training, by style unless given")
    parser.add_argument("--run-s", type=float, default=float("inf"), help="CPU seconds of this run")
    parser.add_argument("--scenes", type=int, default=4000)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    pipe = load(options.model)
    data = load_latents(pipe.vae, options.folder, options.scenes, options.style)
    limit_s = options.limit_s or _LIMIT_S[options.style]
    plan = Plan(peak=1e-3, limit_s=limit_s, run_s=options.run_s, fall=0.5, decay=0.99)
    training = LoraTraining(pipe, options.style, data, plan, folder=options.folder)
    training.run()
    training.save(options.out, base=options.model.name)


if __name__ == "__main__":
    main()
