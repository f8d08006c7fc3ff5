"""What the VAE service can be told."""

from dataclasses import dataclass

from darkroom.runtime.stage import StageConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class VaeConfig(StageConfig):
    """Decodes latents and encodes image files."""
