"""How large each stage's part of a model is, by the catalogue. Pure."""

from darkroom.families import FAMILIES
from darkroom.registry.model_entry import ModelEntry

PART_STAGES = ("denoiser", "encoder", "vae")
"""Those that hold parts of models; ControlNets are fetched by those who call them."""
_CONDITIONING = ("text_encoder", "tokenizer", "image_encoder", "feature_extractor")
_USUAL_DENOISERS = ("unet", "transformer", "transformer_2", "prior")


def stage_bytes(entry: ModelEntry) -> dict[str, float]:
    """Bytes of each stage's part of a model, by its files."""
    family = FAMILIES.get(entry.pipeline)
    denoisers = family.denoisers if family else _USUAL_DENOISERS
    sizes = dict.fromkeys(PART_STAGES, 0.0)
    for component in entry.components:
        if component.name in denoisers:
            sizes["denoiser"] += component.size_bytes
        else:
            sizes["encoder" if component.name.startswith(_CONDITIONING) else "vae"] += component.size_bytes
    return {stage: max(size, 1.0) for stage, size in sizes.items()}
