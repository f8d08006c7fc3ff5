"""What tiny models are made of: tokenizers made on the spot, text encoders and VAEs of a few thousand weights."""

from typing import Any

import torch
from diffusers import AutoencoderKL
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GlmConfig,
    GlmModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

TEXT_WIDTH = 32
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def awake(network: torch.nn.Module, *, gain: float = 1.0) -> Any:
    """The network, with random values where its own start is zero or not even set: no output may be constant.

    `gain` multiplies every matrix, where the text would otherwise hardly reach the answer.
    """
    with torch.no_grad():
        for parameter in network.parameters():
            if not bool(parameter.isfinite().all()) or not bool(parameter.any()):
                parameter.normal_(0.0, 0.1)
            elif parameter.ndim > 1:
                parameter.mul_(gain)
    return network


def clip(tokenizer: CLIPTokenizer, *, projected: bool = False) -> CLIPTextModel | CLIPTextModelWithProjection:
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


def t5(*, width: int = TEXT_WIDTH, umt5: bool = False) -> tuple[T5Tokenizer, T5EncoderModel]:
    letters = [(piece, -2.0) for piece in ["▁", *_LETTERS]]
    tokenizer = T5Tokenizer(
        vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *letters], extra_ids=0, model_max_length=32
    )
    options = {"d_model": width, "d_ff": 37, "d_kv": 8, "num_heads": 4, "num_layers": 2}
    if umt5:
        return tokenizer, UMT5EncoderModel(UMT5Config(vocab_size=len(tokenizer), **options))
    return tokenizer, T5EncoderModel(T5Config(vocab_size=len(tokenizer), **options))


def bert() -> tuple[BertTokenizer, BertModel]:
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *_LETTERS, *(f"##{letter}" for letter in _LETTERS)]
    tokenizer = BertTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, model_max_length=77)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
    )
    return tokenizer, BertModel(config)


def _letter_tokenizer(**options: object) -> PreTrainedTokenizerFast:
    """One token per character, after a token that starts every text, as Gemma and GLM have it."""
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", *map(chr, range(32, 127))]
    special = {"pad_token": pieces[0], "eos_token": pieces[1], "bos_token": pieces[2], "unk_token": pieces[3]}
    vocabulary = models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token=special["unk_token"])
    tokenizer = Tokenizer(vocabulary)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=1024, **special, **options)


def gemma() -> tuple[PreTrainedTokenizerFast, Gemma2Model]:
    tokenizer = _letter_tokenizer()
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        pad_token_id=0,
    )
    return tokenizer, Gemma2Model(config)


def glm() -> tuple[PreTrainedTokenizerFast, GlmModel]:
    tokenizer = _letter_tokenizer(padding_side="left")
    config = GlmConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        pad_token_id=0,
        eos_token_id=1,
    )
    return tokenizer, GlmModel(config)


def _qwen_tokenizer() -> Qwen2Tokenizer:
    pieces = [*bytes_to_unicode().values(), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Qwen2Tokenizer(
        vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], additional_special_tokens=pieces[-2:]
    )
    tokenizer.chat_template = "<|im_start|>{% for message in messages %}{{ message['content'] }}{% endfor %}<|im_end|>"
    return tokenizer


def qwen3() -> tuple[Qwen2Tokenizer, Qwen3Model]:
    tokenizer = _qwen_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=512,
    )
    return tokenizer, Qwen3Model(config)


def qwen_vl() -> tuple[Qwen2Tokenizer, Qwen2_5_VLForConditionalGeneration]:
    tokenizer = _qwen_tokenizer()
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 37,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": TEXT_WIDTH}
    return tokenizer, Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))


def image_vae(*, blocks: int = 2, **options: object) -> AutoencoderKL:
    """Of factor 2 to the power of `blocks` - 1."""
    return AutoencoderKL(
        block_out_channels=(16,) * blocks,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        norm_num_groups=8,
        layers_per_block=1,
        sample_size=32,
        **{"latent_channels": 4, **options},
    )
