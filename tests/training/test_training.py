"""The world the shipped models draw, the judge that reads it, and each training step doing what it should."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from training.denoiser import DenoiserTraining
from training.evaluate import evaluate
from training.judge import read, score
from training.scenes import caption, loose_caption, make_dataset, random_scene
from training.tokenizer import MAX_TOKENS, caption_words, make_tokenizer
from training.vae import encode_all, reconstruct, refine_decoder, train_vae

SHAPES = Path(__file__).parents[2] / "models" / "shapes"


def test_every_word_of_the_caption_language_is_one_token() -> None:
    tokenizer = make_tokenizer()
    for word in caption_words():
        assert len(tokenizer(word).input_ids) == 3, word  # between start and end


def test_words_outside_the_language_are_spelled_and_never_lost() -> None:
    tokenizer = make_tokenizer()
    assert tokenizer.decode(tokenizer("zebra größe").input_ids, skip_special_tokens=True).strip() == "zebra größe"


def test_the_shipped_tokenizer_is_the_one_the_code_makes() -> None:
    from transformers import CLIPTokenizer  # noqa: PLC0415 - beside its only use

    shipped = CLIPTokenizer.from_pretrained(SHAPES / "tokenizer")
    rng = random.Random(3)
    texts = [loose_caption(random_scene(rng), rng) for _ in range(50)]
    assert [shipped(t).input_ids for t in texts] == [make_tokenizer()(t).input_ids for t in texts]
    assert max(len(shipped(t).input_ids) for t in texts) <= MAX_TOKENS


def test_equal_seeds_draw_equal_scenes() -> None:
    first, second = make_dataset(20, seed=4), make_dataset(20, seed=4)
    assert first.scenes == second.scenes
    assert np.array_equal(first.pictures, second.pictures)


def test_the_judge_reads_drawn_truth_without_error() -> None:
    truth = make_dataset(400, seed=77)
    assert score(truth.pictures, truth.scenes).all_four == 1.0


def test_the_judge_sees_what_is_wrong() -> None:
    truth = make_dataset(200, seed=78)
    shuffled = truth.scenes[1:] + truth.scenes[:1]
    assert score(truth.pictures, shuffled).all_four < 0.05
    assert read(np.full((64, 64, 3), 128, np.uint8)) is None


def test_the_vae_learns_and_its_decoder_goes_on_alone() -> None:
    data = make_dataset(8, seed=5)
    pictures = torch.from_numpy(data.pictures)

    def error() -> float:
        return (reconstruct(vae, pictures).float() - pictures.float()).abs().mean().item()

    vae, losses = train_vae(data, steps=20, batch=8)
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    latents, before = encode_all(vae, pictures), error()
    refine_decoder(vae, data, steps=30, batch=8)
    assert error() < 0.9 * before
    assert torch.equal(latents, encode_all(vae, pictures))


def test_the_denoiser_learns_and_its_average_follows() -> None:
    data = make_dataset(32, seed=6)
    training = DenoiserTraining(make_tokenizer(), data.scenes, torch.randn(32, 8, 8, 8))
    start = [p.clone() for p in training.averaged[1].parameters()]
    losses = training.run(steps=20, batch=16)
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    assert any(not torch.equal(a, b) for a, b in zip(start, training.averaged[1].parameters(), strict=True))


@pytest.mark.slow
def test_the_shipped_model_draws_what_the_prompt_says() -> None:
    result, _ = evaluate(SHAPES, 50)
    assert result.all_four >= 0.75  # 85 % or more of 300; a sample of 50 scatters by 10


def test_captions_say_everything() -> None:
    scene = random_scene(random.Random(1))
    for part in (scene.size, scene.colour, scene.shape, scene.place, scene.background):
        assert part in caption(scene)
