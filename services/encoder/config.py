"""What the encoder can be told."""

from dataclasses import dataclass

from darkroom.runtime.stage import StageConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderConfig(StageConfig):
    """Encodes prompts into embeddings."""

    embedding_cache_bytes: int = 16 << 20
    """Bytes of embeddings kept for equal prompts: 70 of SD 1.5's with their negatives. 0 keeps none."""

    def __post_init__(self) -> None:
        """Raises ValueError."""
        StageConfig.__post_init__(self)  # a dataclass with slots is made anew, and super() would look at the old one
        if self.embedding_cache_bytes < 0:
            raise ValueError(f"embedding_cache_bytes must not be negative, not {self.embedding_cache_bytes}")
