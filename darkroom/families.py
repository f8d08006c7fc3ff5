"""The table of pipelines: what Darkroom has to know about a diffusers pipeline class beyond running it. Data only.

Adding a pipeline is adding a row. Everything else is read off the class: its signature, its components, its code.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")

PROMPT, NEGATIVE = "prompt_embeds", "negative_prompt_embeds"
POOLED, NEGATIVE_POOLED = "pooled_prompt_embeds", "negative_pooled_prompt_embeds"
MASK, NEGATIVE_MASK = "prompt_attention_mask", "negative_prompt_attention_mask"


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoding:
    """One call of `encode_prompt`."""

    returns: tuple[str | None, ...]
    """What it returns, by the names under which the pipeline's call takes it; None is not passed on."""
    arguments: Mapping[str, object] = field(default_factory=dict)
    """Arguments beside prompts, device and counts."""
    of_negative: bool = False
    """Encodes the negative prompt, as if it were the prompt; left out where there is no guidance."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One row: a pipeline class of diffusers."""

    pipeline: str
    """Class name in diffusers."""
    denoisers: tuple[str, ...] = ("transformer",)
    """The components that the denoising loop calls; a model may lack some."""
    encodings: tuple[Encoding, ...]
    """How texts become embeddings."""
    widths: Mapping[str, str] = field(default_factory=dict)
    """Last dimension of an embedding, as a key of the denoiser's config; those without are not checked."""
    token_counts: Mapping[str, str] = field(default_factory=dict)
    """Tokens of an embedding, as a key of the denoiser's config, where only that many fit."""
    most_tokens: Mapping[str, int] = field(default_factory=dict)
    """Tokens of an embedding at most, where the denoiser looks positions up in a table: past its end a GPU stops."""
    time_id_count: int = 0
    """Numbers that the denoiser embeds beside the pooled embedding, so that its config counts both as one width."""
    shared: tuple[str, ...] = ()
    """Arguments of the denoiser's forward that have no batch dimension."""
    row_lists: Mapping[str, int] = field(default_factory=dict)
    """Arguments of the denoiser's forward that are a list with a tensor for each row, and to a multiple of what their
    first dimension is padded on the way into a batch. The forward sees them without the padding."""
    listed: tuple[str, ...] = ()
    """Embeddings that the pipeline's call takes as a list with a tensor for each prompt."""
    masks: str = "whole"
    """What the pipeline's masks are made of: `whole` or `real` numbers; empty means whatever arrives."""
    latents: str = "BCHW"
    """Dimensions of the latents: batch, channels, time, height, width; S is a sequence of patches."""
    single_latents: bool = False
    """Whether the loop insists on latents in single precision, whatever its networks run in."""
    latent_patch: int = 1
    """Side of a patch in the sequence S."""
    multiple_px: int = 8
    """What the pipeline insists that width and height are multiples of, whatever its VAE's factor."""
    fewest_steps: int = 1
    """Steps that the pipeline takes at least."""
    guidance: str = "guidance_scale"
    """The argument of the call that takes the guidance scale."""
    classifier_free: bool = True
    """A guidance scale may mean two forwards' worth of rows, and a negative embedding."""
    unguided_scale: float = 1.0
    """The largest guidance scale that needs no negative."""
    equal_lengths: bool = True
    """The negative must have as many tokens as the prompt."""
    options: Mapping[str, object] = field(default_factory=dict)
    """Arguments of the call that Darkroom sets for every request."""
    unread: tuple[str, ...] = ()
    """Tensors that the call insists on beside embeddings and then does not read."""
    requires: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    """Values of the denoiser's config that the row was tried with; a model with others is refused."""
    is_batched: bool = True
    """Whether forwards of different requests may share a batch."""

    @property
    def denoiser(self) -> str:
        """The first component that the denoising loop calls."""
        return self.denoisers[0]

    def embedding_names(self, *, guided: bool) -> tuple[str, ...]:
        """Names of the embeddings that the denoiser needs."""
        names = (name for encoding in self.encodings for name in encoding.returns if name)
        return tuple(name for name in names if guided or not name.startswith("negative_"))

    def is_guided(self, guidance_scale: float) -> bool:
        """Whether this scale makes the pipeline use its negative embedding."""
        return self.classifier_free and guidance_scale > self.unguided_scale


def _both(value: T, *names: str) -> dict[str, T]:
    """The same for embeddings and their negatives."""
    return {prefix + name: value for name in names for prefix in ("", "negative_")}


_MASKED = Encoding(returns=(PROMPT, MASK, NEGATIVE, NEGATIVE_MASK))
_AS_ASKED = {"use_resolution_binning": False}
"""The size asked for is the size drawn, not the nearest of a list of sizes, cut to fit."""

_ROWS = (
    Family(
        pipeline="StableDiffusionPipeline",
        denoisers=("unet",),
        encodings=(Encoding(returns=(PROMPT, NEGATIVE)),),
        widths=_both("cross_attention_dim", PROMPT),
    ),
    Family(
        pipeline="StableDiffusionXLPipeline",
        denoisers=("unet",),
        encodings=(Encoding(returns=(PROMPT, NEGATIVE, POOLED, NEGATIVE_POOLED)),),
        widths=_both("cross_attention_dim", PROMPT) | _both("projection_class_embeddings_input_dim", POOLED),
        time_id_count=6,
    ),
    Family(
        pipeline="StableDiffusion3Pipeline",
        encodings=(Encoding(returns=(PROMPT, NEGATIVE, POOLED, NEGATIVE_POOLED)),),
        widths=_both("joint_attention_dim", PROMPT) | _both("pooled_projection_dim", POOLED),
    ),
    Family(
        pipeline="FluxPipeline",
        encodings=(Encoding(returns=(PROMPT, POOLED, None)),),
        widths={PROMPT: "joint_attention_dim", POOLED: "pooled_projection_dim"},
        shared=("img_ids", "txt_ids"),
        latents="BSC",
        latent_patch=2,
        classifier_free=False,
    ),
    Family(
        pipeline="ChromaPipeline",
        encodings=(Encoding(returns=(PROMPT, None, MASK, NEGATIVE, None, NEGATIVE_MASK)),),
        widths=_both("joint_attention_dim", PROMPT),
        shared=("img_ids", "txt_ids"),
        masks="real",
        latents="BSC",
        latent_patch=2,
        equal_lengths=False,
    ),
    Family(
        pipeline="QwenImagePipeline",
        # one prompt needs no padding, so its mask is always None
        encodings=(Encoding(returns=(PROMPT, None)), Encoding(returns=(NEGATIVE, None), of_negative=True)),
        widths=_both("joint_attention_dim", PROMPT),
        latents="BSC",
        latent_patch=2,
        guidance="true_cfg_scale",
        equal_lengths=False,
        requires={"guidance_embeds": (False, None)},
    ),
    Family(
        pipeline="PixArtAlphaPipeline",
        encodings=(_MASKED,),
        widths=_both("caption_channels", PROMPT),
        fewest_steps=2,  # of a single step it takes the solver's second answer, which most do not give
        options=_AS_ASKED,
    ),
    Family(
        pipeline="PixArtSigmaPipeline",
        encodings=(_MASKED,),
        widths=_both("caption_channels", PROMPT),
        options=_AS_ASKED,
    ),
    Family(
        pipeline="SanaPipeline",
        encodings=(_MASKED,),
        widths=_both("caption_channels", PROMPT),
        multiple_px=32,
        options=_AS_ASKED,
    ),
    Family(
        pipeline="AuraFlowPipeline",
        # its masks are as large as its embeddings, and already multiplied into them
        encodings=(Encoding(returns=(PROMPT, None, NEGATIVE, None)),),
        widths=_both("joint_attention_dim", PROMPT),
        unread=(MASK, NEGATIVE_MASK),
    ),
    Family(
        pipeline="Lumina2Pipeline",
        encodings=(_MASKED,),
        widths=_both("cap_feat_dim", PROMPT),
        most_tokens=_both(256, PROMPT),
        multiple_px=16,
    ),
    Family(
        pipeline="ZImagePipeline",
        single_latents=True,
        encodings=(Encoding(returns=(PROMPT, NEGATIVE)),),
        widths=_both("cap_feat_dim", PROMPT),
        most_tokens=_both(512, PROMPT),
        # the transformer itself pads texts to a multiple of 32
        row_lists={"x": 1, "cap_feats": 32},
        listed=(PROMPT, NEGATIVE),
        unguided_scale=0.0,  # it adds to the prompt's answer, where others add to the negative's
        multiple_px=16,
        equal_lengths=False,
    ),
    Family(
        pipeline="CogView4Pipeline",
        encodings=(Encoding(returns=(PROMPT, NEGATIVE)),),
        widths=_both("text_embed_dim", PROMPT),
        multiple_px=16,
        equal_lengths=False,
    ),
    Family(
        pipeline="HunyuanDiTPipeline",
        encodings=tuple(
            Encoding(
                returns=tuple(name + suffix for name in (PROMPT, NEGATIVE, MASK, NEGATIVE_MASK)),
                arguments={"text_encoder_index": index, "max_sequence_length": token_count},
            )
            for index, suffix, token_count in ((0, "", 77), (1, "_2", 256))
        ),
        widths=_both("cross_attention_dim", PROMPT) | _both("cross_attention_dim_t5", f"{PROMPT}_2"),
        token_counts=_both("text_len", PROMPT) | _both("text_len_t5", f"{PROMPT}_2"),
        shared=("image_rotary_emb",),
        options=_AS_ASKED,
    ),
    Family(
        pipeline="WanPipeline",
        denoisers=("transformer", "transformer_2"),
        encodings=(Encoding(returns=(PROMPT, NEGATIVE)),),
        widths=_both("text_dim", PROMPT),
        latents="BCTHW",
        multiple_px=16,
        equal_lengths=False,
    ),
    Family(
        pipeline="LTXPipeline",
        encodings=(_MASKED,),
        widths=_both("caption_channels", PROMPT),
        latents="BSC",
        multiple_px=32,
    ),
    Family(
        pipeline="CogVideoXPipeline",
        encodings=(Encoding(returns=(PROMPT, NEGATIVE)),),
        widths=_both("text_embed_dim", PROMPT),
        token_counts=_both("max_text_seq_length", PROMPT),
        shared=("image_rotary_emb",),
        latents="BTCHW",
        requires={"patch_size_t": (None,)},
    ),
)

FAMILIES: Mapping[str, Family] = {row.pipeline: row for row in _ROWS}
"""Rows by pipeline class name."""

CONTROLNETS: Mapping[str, tuple[str, ...]] = {
    "ControlNetModel": ("StableDiffusionPipeline", "StableDiffusionXLPipeline"),
    "FluxControlNetModel": ("FluxPipeline",),
    "QwenImageControlNetModel": ("QwenImagePipeline",),
}
"""Classes of ControlNets, each with the pipeline classes whose denoisers it leads."""

IP_ADAPTED = ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline")
"""Pipeline classes that take IP-Adapters."""

REFINERS: Mapping[str, Family] = {
    row.pipeline: row
    for row in (
        Family(
            # an aesthetic score in place of the target size that StableDiffusionXLPipeline has
            pipeline="StableDiffusionXLImg2ImgPipeline",
            denoisers=("unet",),
            encodings=(Encoding(returns=(PROMPT, NEGATIVE, POOLED, NEGATIVE_POOLED)),),
            widths=_both("cross_attention_dim", PROMPT) | _both("projection_class_embeddings_input_dim", POOLED),
            time_id_count=5,
        ),
    )
}
"""Rows of classes that take over another model's latents, or an image, and draw nothing from the text alone."""

_KLEIN = (
    "its call reads the VAE's batch statistics, which the denoiser stage does not hold, and gives latents out already"
    " scaled by them, so that its tail cannot be run from what it gives"
)

UNSUPPORTED: Mapping[str, str] = {
    "Flux2Pipeline": _KLEIN,
    "Flux2KleinPipeline": _KLEIN,
    "KolorsPipeline": (
        "its tokenizer and text encoder are classes inside diffusers' pipeline package, which a model store may not"
        " name, and need the sentencepiece package"
    ),
    "OmniGenPipeline": "it has no embeddings to pass on: text and images go into the denoiser as tokens",
    "HiDreamImagePipeline": "its embeddings have a layer dimension before the batch dimension",
}
"""Pipeline classes that were looked at and cannot be split into stages as they are, and why."""
