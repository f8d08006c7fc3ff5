"""Tiny pipelines of the real classes with random weights: one per row of the family table."""

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from training.tokenizer import make_tokenizer

BETAS = {"steps_offset": 1, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
TEXT_WIDTH = 32


def _clip(tokenizer: CLIPTokenizer, *, projected: bool = False) -> CLIPTextModel | CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=37,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config) if projected else CLIPTextModel(config)


def _t5() -> tuple[T5Tokenizer, T5EncoderModel]:
    letters = [(piece, -2.0) for piece in ["▁", *"abcdefghijklmnopqrstuvwxyz"]]
    tokenizer = T5Tokenizer(
        vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *letters], extra_ids=0, model_max_length=32
    )
    config = T5Config(vocab_size=len(tokenizer), d_model=TEXT_WIDTH, d_ff=37, d_kv=8, num_heads=4, num_layers=2)
    return tokenizer, T5EncoderModel(config)


def _vae(**options: object) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(16, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
        layers_per_block=1,
        sample_size=32,
        **{"latent_channels": 4, **options},
    )


def _unet(**options: object) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 64),
        layers_per_block=1,
        attention_head_dim=4,
        norm_num_groups=8,
        **{"cross_attention_dim": TEXT_WIDTH, **options},
    )


def stable_diffusion() -> DiffusionPipeline:
    """SD 1.x: one CLIP encoder, a UNet."""
    tokenizer = make_tokenizer()
    return StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=_clip(tokenizer),
        tokenizer=tokenizer,
        unet=_unet(),
        scheduler=DDIMScheduler(**BETAS, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl() -> DiffusionPipeline:
    """SDXL: two CLIP encoders, pooled embedding and time ids beside the text."""
    tokenizer = make_tokenizer()
    unet = _unet(
        cross_attention_dim=2 * TEXT_WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + TEXT_WIDTH,
        use_linear_projection=True,
    )
    return StableDiffusionXLPipeline(
        vae=_vae(),
        text_encoder=_clip(tokenizer),
        text_encoder_2=_clip(tokenizer, projected=True),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=EulerDiscreteScheduler(**BETAS, timestep_spacing="leading"),
    )


def stable_diffusion_3() -> DiffusionPipeline:
    """SD3: two CLIP encoders and T5, a transformer, flow matching."""
    tokenizer, (t5_tokenizer, t5) = make_tokenizer(), _t5()
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=2 * TEXT_WIDTH,
        caption_projection_dim=32,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=32,
    )
    # T5 comes out as wide as both CLIP encoders together
    t5 = T5EncoderModel(
        T5Config(vocab_size=len(t5_tokenizer), d_model=2 * TEXT_WIDTH, d_ff=37, d_kv=8, num_heads=4, num_layers=2)
    )
    return StableDiffusion3Pipeline(
        vae=_vae(shift_factor=0.06),
        text_encoder=_clip(tokenizer, projected=True),
        text_encoder_2=_clip(tokenizer, projected=True),
        text_encoder_3=t5,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=t5_tokenizer,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def flux() -> DiffusionPipeline:
    """Flux: CLIP for the pooled embedding, T5 for the text, packed latents, embedded guidance."""
    tokenizer, (t5_tokenizer, t5) = make_tokenizer(), _t5()
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06, scaling_factor=1.5),
        text_encoder=_clip(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=t5,
        tokenizer_2=t5_tokenizer,
        transformer=transformer,
    )


TINY_MODELS: dict[str, Callable[[], DiffusionPipeline]] = {
    "tiny-sd": stable_diffusion,
    "tiny-sdxl": stable_diffusion_xl,
    "tiny-sd3": stable_diffusion_3,
    "tiny-flux": flux,
}


def save_tiny_model(root: Path, model_id: str) -> None:
    """Writes one tiny model into a model store; equal ids give equal weights."""
    torch.manual_seed(sum(model_id.encode()))
    TINY_MODELS[model_id]().save_pretrained(root / model_id, safe_serialization=True)
