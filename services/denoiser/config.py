"""What the denoiser can be told."""

from dataclasses import dataclass

from darkroom.policy.fusion import MOST_PAIRS
from darkroom.runtime.stage import StageConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class DenoiserConfig(StageConfig):
    """Denoises latents, the steps of many requests batched."""

    controlnets_only: bool = False
    """Whether this replica is one of the stage `controlnet`: it holds ControlNets for denoisers, and nothing else."""
    remote_controlnets: bool = False
    """Whether ControlNets are called at the stage `controlnet`, and not held here."""
    merged_pairs: int = 0
    """Pairs of a model and LoRAs that are kept merged, at most, in room that nothing else has. Off: it pays only where
    few requests run at once, for a merged pair's share no batches with others."""

    def __post_init__(self) -> None:
        """Raises ValueError."""
        super(DenoiserConfig, self).__post_init__()  # dataclass slots make another class of it, which super() misses
        if self.controlnets_only and self.remote_controlnets:
            raise ValueError("controlnets_only and remote_controlnets exclude each other")
        if not 0 <= self.merged_pairs <= MOST_PAIRS:
            raise ValueError(f"merged_pairs must be 0 to {MOST_PAIRS}, not {self.merged_pairs}")
