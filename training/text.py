"""Trains the text encoders of the family, CLIP's and T5's: what a caption says, before anything is drawn.

Trained together with a UNet it learns the background, which fills most of a picture, and nothing else for very long.
So it learns from captions alone, which cost next to nothing: from the end of the text on, every position must know
each attribute, or that the caption leaves it open. That `a left of b` and `b right of a` are the same is learned here
too. All models of the family share CLIP's; `shapes-dit` has T5's besides.

    python -m training.text --kind clip
"""

import argparse
import random
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from training.descent import Descent, Plan
from training.features import QUESTIONS, answers
from training.scenes import PLACES, RELATIONS, SIZES, Scene, loose_caption, random_scene
from training.tokenizer import MAX_TOKENS, make_t5_tokenizer, make_tokenizer

Kind = Literal["clip", "t5"]
TEXT_WIDTH = 128
_OPEN = "open"
_ANSWERS = {question: (*names, _OPEN) for question, names in QUESTIONS.items()}
_EMPTY_SHARE = 0.03
_ASKED_COUNT = 4  # positions asked, of each caption


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """An untrained CLIP text model over the caption vocabulary."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_t5_encoder(tokenizer: T5Tokenizer) -> T5EncoderModel:
    """An untrained T5 encoder over the caption vocabulary."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=TEXT_WIDTH,
            d_ff=2 * TEXT_WIDTH,
            d_kv=32,
            num_heads=4,
            num_layers=3,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
    )


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> torch.Tensor:
    """[B, MAX_TOKENS] ids, as the pipeline makes them."""
    tokens = tokenizer(texts, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
    ids: torch.Tensor = tokens.input_ids
    return ids


@torch.no_grad()
def embed(tokenizer: PreTrainedTokenizerBase, text_encoder: PreTrainedModel, texts: list[str]) -> torch.Tensor:
    """[B, MAX_TOKENS, TEXT_WIDTH], as the pipeline makes it."""
    embedding_BTD: torch.Tensor = text_encoder(token_ids(tokenizer, texts))[0]
    return embedding_BTD


def told(text: str, scene: Scene) -> dict[str, str]:
    """What a caption of the scene answers to each question; without a relation, things come as they are named."""
    if not text:
        return dict.fromkeys(_ANSWERS, _OPEN)
    answered = answers(scene)
    if "background" not in text:
        answered["background"] = _OPEN
    if not scene.is_hard and not _has(text, SIZES):
        answered["size"] = _OPEN
    if not _has(text, RELATIONS if scene.is_hard else PLACES):
        answered["place"] = _OPEN
        if scene.is_hard:
            things = sorted(scene.things, key=lambda thing: text.index(f"{thing.colour} {thing.shape}"))
            for order, thing in zip(("first", "second"), things, strict=True):
                answered[f"{order} colour"], answered[f"{order} shape"] = thing.colour, thing.shape
    return answered


def _has(text: str, phrases: Iterable[str]) -> bool:
    """Whether one of the phrases is in the text. Articles may be missing in both."""
    return any(_bare(phrase) in _bare(text) for phrase in phrases)


def _bare(text: str) -> str:
    return re.sub(r"\b(a|an|the) ", "", text)


class TextTraining:
    """A text encoder in training, and the questions that it is asked."""

    def __init__(self, kind: Kind, plan: Plan, *, folder: Path | None = None) -> None:
        torch.manual_seed(14)
        self._tokenizer = make_tokenizer() if kind == "clip" else make_t5_tokenizer()
        make = make_text_encoder if kind == "clip" else make_t5_encoder
        self._encoder = make(self._tokenizer).train()
        self._heads = nn.ModuleList([nn.Linear(TEXT_WIDTH, len(names)) for names in _ANSWERS.values()])
        networks = {"text_encoder": self._encoder, "heads": self._heads}
        self.descent = Descent("text" if kind == "clip" else "text-t5", networks, plan, seed=14, folder=folder)

    @property
    def averaged(self) -> PreTrainedModel:
        """The average of the encoder: what is shipped."""
        return self.descent.averaged("text_encoder")

    def loss(self, batch: int) -> torch.Tensor:
        """The error of the answers at random positions from the end of the text on, for random captions."""
        texts, targets = self._captions(batch, self.descent.rng)
        ids_BT = token_ids(self._tokenizer, texts)
        ends_B = self._ends(ids_BT)
        asked_BN = ends_B[:, None] + (torch.rand(batch, _ASKED_COUNT) * (MAX_TOKENS - ends_B[:, None])).long()
        asked_BN[:, 0] = ends_B
        known_BND = self._encoder(ids_BT)[0].gather(1, asked_BN[..., None].expand(-1, -1, TEXT_WIDTH))
        errors = [
            F.cross_entropy(head(known_BND).flatten(0, 1), target_B.repeat_interleave(_ASKED_COUNT))
            for head, target_B in zip(self._heads, targets, strict=True)
        ]
        return torch.stack(errors).sum()

    @torch.no_grad()
    def share_understood(self, count: int, seed: int = 15) -> float:
        """The share of new captions of which every answer is right, at the end of the text and at the last position."""
        texts, targets = self._captions(count, random.Random(seed))
        ids_BT = token_ids(self._tokenizer, texts)
        ends_B = self._ends(ids_BT)
        embedding_BTD = self.averaged(ids_BT)[0]
        right_B = torch.ones(count, dtype=torch.bool)
        heads = self.descent.averaged("heads")
        assert isinstance(heads, nn.ModuleList)
        for position_B in (ends_B, torch.full((count,), MAX_TOKENS - 1)):
            known_BD = embedding_BTD[torch.arange(count), position_B]
            for head, target_B in zip(heads, targets, strict=True):
                right_B &= head(known_BD).argmax(1) == target_B
        return right_B.float().mean().item()

    def run(self, *, batch: int = 128) -> list[float]:
        """Trains until the plan ends. Returns the loss of each step."""
        return self.descent.run(lambda: self.loss(batch))

    def _ends(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """Where each text's end token is; what follows is padding."""
        ends_B: torch.Tensor = (ids_BT == self._tokenizer.eos_token_id).int().argmax(1)
        return ends_B

    def _captions(self, count: int, rng: random.Random) -> tuple[list[str], list[torch.Tensor]]:
        scenes = [random_scene(rng) for _ in range(count)]
        texts = ["" if rng.random() < _EMPTY_SHARE else loose_caption(scene, rng) for scene in scenes]
        said = [told(text, scene) for text, scene in zip(texts, scenes, strict=True)]
        return texts, [torch.tensor([names.index(s[q]) for s in said]) for q, names in _ANSWERS.items()]


def main() -> None:
    """Trains a text encoder into `folder` and says what it understands."""
    parser = argparse.ArgumentParser(prog="python -m training.text", description=__doc__)
    parser.add_argument("--kind", choices=get_args(Kind), default="clip")
    parser.add_argument("--folder", type=Path, default=Path("out/training"))
    parser.add_argument("--limit-s", type=float, default=240, help="CPU seconds of the whole training")
    parser.add_argument("--run-s", type=float, default=float("inf"), help="CPU seconds of this run")
    options = parser.parse_args()
    torch.set_num_threads(1)
    plan = Plan(peak=1e-3, limit_s=options.limit_s, run_s=options.run_s, fall=0.5, decay=0.99, weight_decay=1e-2)
    training = TextTraining(options.kind, plan, folder=options.folder)
    training.run()
    training.averaged.save_pretrained(options.folder / ("text_encoder" if options.kind == "clip" else "text_encoder_2"))
    print(f"understands {training.share_understood(2000):.2%} of new captions")


if __name__ == "__main__":
    main()
