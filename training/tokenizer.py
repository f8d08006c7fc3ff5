"""A fixed vocabulary: one token per word of the caption language, and every byte (CLIP) or letter (T5) for the rest.

Training a BPE gives another vocabulary on each run; here the merges are generated, so the file never changes.
"""

import re
from itertools import pairwise

from transformers import CLIPTokenizer, T5Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from training.scenes import BACKGROUNDS, COLOURS, PLACES, RELATIONS, SHAPES, SIZES

MAX_TOKENS = 32
_END = "</w>"


def caption_words() -> list[str]:
    """Every word a caption can hold, in a fixed order."""
    phrases = ["a", "on", "background", *SIZES, *COLOURS, *SHAPES, *PLACES, *BACKGROUNDS, "an", "and", "to", *RELATIONS]
    return list(dict.fromkeys(re.findall(r"[a-z]+", " ".join(phrases))))


def _apply(pieces: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """Byte-pair encoding: merges the pair of lowest rank until none is left."""
    while True:
        pairs = [(ranks[pair], i) for i, pair in enumerate(pairwise(pieces)) if pair in ranks]
        if not pairs:
            return pieces
        _, i = min(pairs)
        pieces = [*pieces[:i], pieces[i] + pieces[i + 1], *pieces[i + 2 :]]


def word_merges(words: list[str]) -> list[tuple[str, str]]:
    """Merges under which each word becomes one token.

    Each word adds, after all earlier merges, what is still missing to join its pieces. A later merge has a higher
    rank, and an earlier word always has one of its own left to apply, so no word undoes another.
    """
    ranks: dict[tuple[str, str], int] = {}
    for word in words:
        pieces = _apply([*word[:-1], word[-1] + _END], ranks)
        while len(pieces) > 1:
            ranks[(pieces[0], pieces[1])] = len(ranks)
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
    return list(ranks)


def make_tokenizer() -> CLIPTokenizer:
    """The stock CLIPTokenizer over the fixed vocabulary."""
    alphabet = list(bytes_to_unicode().values())
    merges = word_merges(caption_words())
    tokens = [*alphabet, *(a + _END for a in alphabet), *(a + b for a, b in merges), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)


def make_t5_tokenizer() -> T5Tokenizer:
    """The stock T5Tokenizer over the same words; others are spelled in letters."""
    words = [f"▁{word}" for word in caption_words()]
    letters = [letter for letter in ["▁", *"abcdefghijklmnopqrstuvwxyz0123456789.,-'"] if letter not in words]
    pieces = [*((word, -1.0) for word in words), *((letter, -8.0) for letter in letters)]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0)]
    return T5Tokenizer(vocab=[*special, *pieces], extra_ids=0, model_max_length=MAX_TOKENS)
