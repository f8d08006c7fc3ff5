"""What the denoiser can be told."""

from dataclasses import dataclass

from darkroom.runtime.stage import StageConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class DenoiserConfig(StageConfig):
    """Denoises latents, the steps of many requests batched."""

    controlnets_only: bool = False
    """Whether this replica is one of the stage `controlnet`: it holds ControlNets for denoisers, and nothing else."""
    remote_controlnets: bool = False
    """Whether ControlNets are called at the stage `controlnet`, and not held here."""

    def __post_init__(self) -> None:
        """Raises ValueError."""
        super(DenoiserConfig, self).__post_init__()  # dataclass slots make another class of it, which super() misses
        if self.controlnets_only and self.remote_controlnets:
            raise ValueError("controlnets_only and remote_controlnets exclude each other")
