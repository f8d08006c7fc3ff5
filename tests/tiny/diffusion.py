"""Tiny image pipelines that predict noise, with a scheduler of betas."""

from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HunyuanDiT2DModel,
    HunyuanDiTPipeline,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

from tests.tiny.parts import TEXT_WIDTH, awake, bert, clip, image_vae, t5
from training.tokenizer import make_tokenizer

BETAS = {"steps_offset": 1, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


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
        vae=image_vae(),
        text_encoder=clip(tokenizer),
        tokenizer=tokenizer,
        unet=_unet(),
        scheduler=DDIMScheduler(**BETAS, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_inpaint() -> DiffusionPipeline:
    """SD 1.x made for inpainting: its UNet sees the mask and what is outside of it."""
    whole = stable_diffusion()
    return StableDiffusionInpaintPipeline(
        **{**whole.components, "unet": _unet(in_channels=9)}, requires_safety_checker=False
    )


def stable_diffusion_xl_refiner() -> DiffusionPipeline:
    """SDXL's refiner: the second of its text encoders, an aesthetic score."""
    base = stable_diffusion_xl()
    unet = _unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=5 * 8 + TEXT_WIDTH,
        use_linear_projection=True,
    )
    own = {"unet": unet, "text_encoder": None, "tokenizer": None}
    return StableDiffusionXLImg2ImgPipeline(**{**base.components, **own}, requires_aesthetics_score=True)


def controlnet(**options: object) -> ControlNetModel:
    """Leads `stable_diffusion`."""
    network = ControlNetModel.from_unet(_unet(**options), conditioning_embedding_out_channels=(8, 16))
    return awake(network)


def controlnet_xl() -> ControlNetModel:
    """Leads `stable_diffusion_xl`."""
    return controlnet(
        cross_attention_dim=2 * TEXT_WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + TEXT_WIDTH,
        use_linear_projection=True,
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
        vae=image_vae(),
        text_encoder=clip(tokenizer),
        text_encoder_2=clip(tokenizer, projected=True),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=EulerDiscreteScheduler(**BETAS, timestep_spacing="leading"),
    )


def _pixart(kind: type[DiffusionPipeline], *, sample_size: int) -> DiffusionPipeline:
    tokenizer, text_encoder = t5()
    transformer = PixArtTransformer2DModel(
        sample_size=sample_size,
        patch_size=2,
        in_channels=4,
        out_channels=8,  # noise and its variance
        num_layers=2,
        num_attention_heads=4,
        attention_head_dim=12,
        cross_attention_dim=48,
        caption_channels=TEXT_WIDTH,
    )
    return kind(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=image_vae(),
        transformer=awake(transformer),
        scheduler=DPMSolverMultistepScheduler(),
    )


def pixart_alpha() -> DiffusionPipeline:
    """PixArt-alpha: T5 with a mask, size and aspect ratio beside the text."""
    return _pixart(PixArtAlphaPipeline, sample_size=128)


def pixart_sigma() -> DiffusionPipeline:
    """PixArt-Sigma: T5 with a mask."""
    return _pixart(PixArtSigmaPipeline, sample_size=32)


def hunyuan_dit() -> DiffusionPipeline:
    """HunyuanDiT: BERT and T5, each with a mask, texts of fixed length."""
    (tokenizer, text_encoder), (tokenizer_2, text_encoder_2) = bert(), t5()
    transformer = HunyuanDiT2DModel(
        sample_size=16,
        num_layers=2,
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        hidden_size=32,
        cross_attention_dim=TEXT_WIDTH,
        cross_attention_dim_t5=TEXT_WIDTH,
        pooled_projection_dim=16,
        activation_fn="gelu-approximate",
    )
    return HunyuanDiTPipeline(
        vae=image_vae(blocks=4),  # the pipeline counts patches as if every VAE's factor were 8
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=awake(transformer),
        scheduler=DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.02),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
    )


def latent_consistency() -> DiffusionPipeline:
    """A latent consistency model: a pipeline class without a row in the table."""
    tokenizer = make_tokenizer()
    return LatentConsistencyModelPipeline(
        vae=image_vae(),
        text_encoder=clip(tokenizer),
        tokenizer=tokenizer,
        unet=_unet(time_cond_proj_dim=32),
        scheduler=LCMScheduler(**{**BETAS, "steps_offset": 0}),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
