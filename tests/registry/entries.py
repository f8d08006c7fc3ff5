"""Catalogue entries for tests."""

from darkroom.registry.catalogue import ComponentEntry, LoraEntry, ModelEntry


def make_entry(model_id: str, *, default_step_count: int = 25) -> ModelEntry:
    """An entry like one of a small Stable Diffusion."""
    return ModelEntry(
        model_id=model_id,
        pipeline="StableDiffusionPipeline",
        components=(ComponentEntry(name="unet", size_bytes=1 << 33), ComponentEntry(name="vae", size_bytes=0)),
        schedulers=("ddim", "euler"),
        default_width_px=512,
        default_height_px=768,
        size_multiple_px=8,
        default_step_count=default_step_count,
        default_guidance_scale=7.5,
    )


def make_lora_entry(lora_id: str, *, default_scale: float = 1.0) -> LoraEntry:
    """An entry like one of a LoRA for `sd`."""
    return LoraEntry(
        lora_id=lora_id,
        base_model="sd",
        default_scale=default_scale,
        stages=("encoder", "denoiser"),
        size_bytes=1 << 27,
    )
