"""Tiny image pipelines trained by flow matching."""

import warnings

from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderDC,
    AutoencoderKLQwenImage,
    ChromaPipeline,
    ChromaTransformer2DModel,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxControlNetModel,
    FluxPipeline,
    FluxTransformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    QwenImageControlNetModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)

from tests.tiny.parts import TEXT_WIDTH, awake, clip, gemma, glm, image_vae, qwen3, qwen_vl, t5
from training.tokenizer import make_tokenizer


def stable_diffusion_3(channels: int = 4) -> DiffusionPipeline:
    """SD3: two CLIP encoders and T5, a transformer, flow matching."""
    # T5 comes out as wide as both CLIP encoders together
    tokenizer, (t5_tokenizer, t5_encoder) = make_tokenizer(), t5(width=2 * TEXT_WIDTH)
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=channels,
        out_channels=channels,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=2 * TEXT_WIDTH,
        caption_projection_dim=32,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=32,
    )
    return StableDiffusion3Pipeline(
        vae=image_vae(shift_factor=0.06, latent_channels=channels),
        text_encoder=clip(tokenizer, projected=True),
        text_encoder_2=clip(tokenizer, projected=True),
        text_encoder_3=t5_encoder,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=t5_tokenizer,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def flux() -> DiffusionPipeline:
    """Flux: CLIP for the pooled embedding, T5 for the text, packed latents, embedded guidance."""
    tokenizer, (t5_tokenizer, t5_encoder) = make_tokenizer(), t5()
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
        vae=image_vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06, scaling_factor=1.5),
        text_encoder=clip(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=t5_encoder,
        tokenizer_2=t5_tokenizer,
        transformer=transformer,
    )


def flux_controlnet() -> FluxControlNetModel:
    """Leads `flux`."""
    network = FluxControlNetModel(
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
    return awake(network)


def chroma() -> DiffusionPipeline:
    """Chroma: Flux without the pooled embedding, guided by a negative, text tokens masked."""
    tokenizer, text_encoder = t5()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of diffusers' own code, about diffusers' own code
        transformer = ChromaTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=2,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=TEXT_WIDTH,
            axes_dims_rope=(4, 4, 8),
            approximator_hidden_dim=32,
            approximator_layers=1,
            approximator_num_channels=16,
        )
    return ChromaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=image_vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06, scaling_factor=1.5),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=awake(transformer),
    )


def qwen_image() -> DiffusionPipeline:
    """Qwen-Image: a language model that also sees, packed latents, a VAE of videos."""
    tokenizer, text_encoder = qwen_vl()
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH,
        axes_dims_rope=(4, 4, 8),
    )
    vae = AutoencoderKLQwenImage(
        base_dim=12,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 2.0, 1.0, 0.5],
    )
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=awake(transformer),
    )


def qwen_image_controlnet() -> QwenImageControlNetModel:
    """Leads `qwen_image`."""
    network = QwenImageControlNetModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH,
        axes_dims_rope=(4, 4, 8),
    )
    return awake(network)


def sana() -> DiffusionPipeline:
    """Sana: a language model with instructions before the prompt, linear attention, a VAE of its own kind."""
    tokenizer, text_encoder = gemma()
    transformer = SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=16,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=TEXT_WIDTH,
        caption_channels=TEXT_WIDTH,
        sample_size=32,
    )
    vae = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_types=("ResBlock", "ResBlock"),
        decoder_block_types=("ResBlock", "ResBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        upsample_block_type="interpolate",
        downsample_block_type="conv",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.4,
    )
    return SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=vae,
        transformer=awake(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def aura_flow() -> DiffusionPipeline:
    """AuraFlow: UMT5, register tokens."""
    tokenizer, text_encoder = t5(umt5=True)
    transformer = AuraFlowTransformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=TEXT_WIDTH,
        caption_projection_dim=32,
        pos_embed_max_size=256,
    )
    return AuraFlowPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=image_vae(),
        transformer=awake(transformer, gain=3.0),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
    )


def lumina_2() -> DiffusionPipeline:
    """Lumina 2: a language model's text with a mask, of which the transformer takes the unmasked length."""
    tokenizer, text_encoder = gemma()
    transformer = Lumina2Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        hidden_size=24,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 4, 4),
        axes_lens=(512, 64, 64),
        cap_feat_dim=TEXT_WIDTH,
    )
    return Lumina2Pipeline(
        transformer=awake(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=image_vae(blocks=4, shift_factor=0.06),  # the pipeline takes 8 for every VAE's factor
        text_encoder=text_encoder,
        tokenizer=tokenizer,
    )


def z_image() -> DiffusionPipeline:
    """Z-Image: a list of texts, each of its own length, and a list of latents."""
    tokenizer, text_encoder = qwen3()
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=TEXT_WIDTH,
        axes_dims=[4, 4, 8],
        axes_lens=[512, 32, 32],
    )
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=image_vae(shift_factor=0.1, scaling_factor=0.36),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=awake(transformer),
    )


def cogview_4() -> DiffusionPipeline:
    """CogView4: a language model's text in steps of 16 tokens, sizes and crop beside it."""
    tokenizer, text_encoder = glm()
    transformer = CogView4Transformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        text_embed_dim=TEXT_WIDTH,
        time_embed_dim=8,
        condition_dim=4,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        base_shift=0.25,
        max_shift=0.75,
        base_image_seq_len=256,
        use_dynamic_shifting=True,
        time_shift_type="linear",
    )
    return CogView4Pipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=image_vae(),
        transformer=awake(transformer),
        scheduler=scheduler,
    )
