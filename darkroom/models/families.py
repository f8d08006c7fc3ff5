"""The table of pipelines: what Darkroom has to know about a diffusers pipeline class beyond running it. Data only.

Adding a pipeline is adding a row. Everything else is read off the class: its signature, its components, its code.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

PROMPT, NEGATIVE = "prompt_embeds", "negative_prompt_embeds"
POOLED, NEGATIVE_POOLED = "pooled_prompt_embeds", "negative_pooled_prompt_embeds"


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One row: a pipeline class of diffusers."""

    pipeline: str
    """Class name in diffusers."""
    denoiser: str
    """The component that the denoising loop calls."""
    encode_returns: tuple[str | None, ...]
    """What `encode_prompt` returns, by the names under which the pipeline's call takes it; None is not passed on."""
    widths: Mapping[str, str] = field(default_factory=dict)
    """Last dimension of an embedding, as a key of the denoiser's config; those without are not checked."""
    time_id_count: int = 0
    """Numbers that the denoiser embeds beside the pooled embedding, so that its config counts both as one width."""
    shared: tuple[str, ...] = ()
    """Arguments of the denoiser's forward that have no batch dimension."""
    packed_latents: bool = False
    """Latents are a sequence of 2 x 2 patches, [B, H/2 * W/2, 4 C], not [B, C, H, W]."""
    classifier_free: bool = True
    """A guidance scale above 1 means two forwards' worth of rows, and a negative embedding."""

    def embedding_names(self, *, guided: bool) -> tuple[str, ...]:
        """Names of the embeddings that the denoiser needs."""
        names = (name for name in self.encode_returns if name)
        return tuple(name for name in names if guided or not name.startswith("negative_"))

    def is_guided(self, guidance_scale: float) -> bool:
        """Whether this scale makes the pipeline use its negative embedding."""
        return self.classifier_free and guidance_scale > 1


_ROWS = (
    Family(
        pipeline="StableDiffusionPipeline",
        denoiser="unet",
        encode_returns=(PROMPT, NEGATIVE),
        widths={PROMPT: "cross_attention_dim", NEGATIVE: "cross_attention_dim"},
    ),
    Family(
        pipeline="StableDiffusionXLPipeline",
        denoiser="unet",
        encode_returns=(PROMPT, NEGATIVE, POOLED, NEGATIVE_POOLED),
        widths={
            PROMPT: "cross_attention_dim",
            NEGATIVE: "cross_attention_dim",
            POOLED: "projection_class_embeddings_input_dim",
            NEGATIVE_POOLED: "projection_class_embeddings_input_dim",
        },
        time_id_count=6,
    ),
    Family(
        pipeline="StableDiffusion3Pipeline",
        denoiser="transformer",
        encode_returns=(PROMPT, NEGATIVE, POOLED, NEGATIVE_POOLED),
        widths={
            PROMPT: "joint_attention_dim",
            NEGATIVE: "joint_attention_dim",
            POOLED: "pooled_projection_dim",
            NEGATIVE_POOLED: "pooled_projection_dim",
        },
    ),
    Family(
        pipeline="FluxPipeline",
        denoiser="transformer",
        encode_returns=(PROMPT, POOLED, None),
        widths={PROMPT: "joint_attention_dim", POOLED: "pooled_projection_dim"},
        shared=("img_ids", "txt_ids"),
        packed_latents=True,
        classifier_free=False,
    ),
)

FAMILIES: Mapping[str, Family] = {row.pipeline: row for row in _ROWS}
"""Rows by pipeline class name."""
