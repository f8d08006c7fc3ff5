"""Runs of tiny models with LoRAs, in the executor and by plain diffusers, for the tests to compare."""

from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import DiffusionPipeline

from darkroom.models.loader import Part
from darkroom.models.own import fresh_scheduler, own_copy
from darkroom.wire.tasks import LoraUse

Uses = tuple[tuple[str, float], ...]


class StandIns(Protocol):
    """What a request holds of its LoRAs."""

    def stand_ins(self) -> dict[str, torch.nn.Module]: ...


def plain_pipeline(models: Path, model_id: str) -> DiffusionPipeline:
    pipeline = DiffusionPipeline.from_pretrained(models / model_id)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def plain_with(models: Path, model_id: str, store: Path, uses: Uses) -> DiffusionPipeline:
    """Diffusers' own way to the same weights."""
    pipeline = plain_pipeline(models, model_id)
    for lora_id in dict.fromkeys(lora_id for lora_id, _ in uses):
        pipeline.load_lora_weights(store / lora_id, adapter_name=lora_id)
    pipeline.set_adapters([lora_id for lora_id, _ in uses], [scale for _, scale in uses])
    return pipeline


@torch.no_grad()
def embeddings(models: Path, part: Part) -> dict[str, torch.Tensor]:
    answer = encoded(plain_pipeline(models, part.model_id), part)
    (encoding,) = part.family.encodings
    return {name: value for name, value in zip(encoding.returns, answer, strict=True) if name}


def encoded(pipeline: DiffusionPipeline, part: Part) -> list[torch.Tensor]:
    taken = pipeline.encode_prompt.__code__.co_varnames
    options: dict[str, Any] = {name: None for name in ("prompt_2", "prompt_3") if name in taken}
    if part.family.classifier_free:
        options["do_classifier_free_guidance"] = True
    return list(pipeline.encode_prompt("a ring", device="cpu", num_images_per_prompt=1, **options))


def latents(pipeline: DiffusionPipeline, given: dict[str, torch.Tensor], seed: int) -> torch.Tensor:
    answer: torch.Tensor = pipeline(
        **given,
        num_inference_steps=3,
        guidance_scale=3.0,
        width=32,
        height=32,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
        return_dict=False,
    )[0]
    return answer


def with_loras(part: Part, combination: StandIns | None) -> DiffusionPipeline:
    pipeline = own_copy(part)
    pipeline.scheduler = fresh_scheduler(part.pipeline.scheduler, "")
    for name, stand_in in (combination.stand_ins() if combination else {}).items():
        setattr(pipeline, name, stand_in)
    return pipeline


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp(min=1e-9))


def uses_of(uses: Uses) -> tuple[LoraUse, ...]:
    return tuple(LoraUse(lora_id, scale) for lora_id, scale in uses)


def denoised(part: Part, combination: StandIns | None, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """The program of a request with LoRAs, or without."""
    return latents(with_loras(part, combination), given, 5)
