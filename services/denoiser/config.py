"""What the denoiser can be told."""

from dataclasses import dataclass

from darkroom.runtime.stage import StageConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class DenoiserConfig(StageConfig):
    """Denoises latents, the steps of many requests batched."""
