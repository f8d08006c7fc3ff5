"""The world that the shipped models draw, the words for it, and the judge that reads it."""

import random

import numpy as np

from training.judge import mark_all, read
from training.scenes import (
    RELATIONS,
    SIZE_PX,
    Scene,
    Thing,
    caption,
    draw,
    loose_caption,
    make_dataset,
    random_pair,
    random_scene,
    random_scenes,
    random_single,
    turned,
)
from training.tokenizer import MAX_TOKENS, caption_words, make_tokenizer


def pair(place: str = "left of") -> Scene:
    things = (Thing(colour="red", shape="circle"), Thing(colour="orange", shape="square"))
    return Scene(things=things, place=place, background="gray")


def test_every_word_of_the_caption_language_is_one_token() -> None:
    tokenizer = make_tokenizer()
    for word in caption_words():
        assert len(tokenizer(word).input_ids) == 3, word  # between start and end


def test_no_caption_uses_a_word_outside_the_language_or_is_cut_off() -> None:
    tokenizer, rng, words = make_tokenizer(), random.Random(3), set(caption_words())
    for scene in random_scenes(300, seed=8):
        text = loose_caption(scene, rng)
        assert set(text.split()) <= words
        assert len(tokenizer(text).input_ids) <= MAX_TOKENS


def test_words_outside_the_language_are_spelled_and_never_lost() -> None:
    tokenizer = make_tokenizer()
    assert tokenizer.decode(tokenizer("zebra größe").input_ids, skip_special_tokens=True).strip() == "zebra größe"


def test_captions_say_everything() -> None:
    scene = random_single(random.Random(1))
    (thing,) = scene.things
    for part in (str(thing.size), thing.colour, thing.shape, scene.place, scene.background):
        assert part in caption(scene)
    assert caption(pair()) == "a red circle left of an orange square on a gray background"


def test_a_pair_can_be_told_from_either_side() -> None:
    assert caption(turned(pair("above"))) == "an orange square below a red circle on a gray background"
    assert turned(turned(pair())) == pair()
    first, second = (draw(scene, random.Random(1)).picture for scene in (pair(), turned(pair())))
    assert np.abs(first.astype(int) - second).mean() < 10  # the jitter differs


def test_equal_seeds_draw_equal_scenes() -> None:
    first, second = make_dataset(20, seed=4), make_dataset(20, seed=4)
    assert first.scenes == second.scenes == random_scenes(20, seed=4)
    assert np.array_equal(first.pictures, second.pictures)


def test_two_things_never_overlap_nor_leave_the_picture() -> None:
    rng = random.Random(5)
    for _ in range(200):
        masks = draw(random_pair(rng), rng).masks > 0
        assert not (masks[0] & masks[1]).any()
        for mask in masks:
            assert mask[1:-1, 1:-1].sum() == mask.sum()


def test_the_judge_reads_drawn_truth_without_error() -> None:
    truth = make_dataset(400, seed=77)
    assert all(marks.everything for marks in mark_all(truth.pictures, truth.scenes))


def test_the_judge_sees_what_is_wrong() -> None:
    truth = make_dataset(200, seed=78)
    shuffled = truth.scenes[1:] + truth.scenes[:1]
    assert sum(marks.everything for marks in mark_all(truth.pictures, shuffled)) <= 4
    assert read(np.full((SIZE_PX, SIZE_PX, 3), 128, np.uint8)) is None


def test_things_swapped_count_against_their_relation_alone() -> None:
    rng = random.Random(2)
    for place in RELATIONS:
        asked = pair(place)
        swapped = Scene(things=asked.things[::-1], place=place, background=asked.background)
        (marks,) = mark_all(draw(swapped, rng).picture[None], [asked])
        assert (marks.colour, marks.shape, marks.place, marks.everything) == (True, True, False, False)


def test_a_missing_thing_is_wrong_whatever_else_is_right() -> None:
    scene = random_scene(random.Random(1))
    (marks,) = mark_all(np.full((1, SIZE_PX, SIZE_PX, 3), 128, np.uint8), [scene])
    assert (marks.count, marks.colour, marks.everything) == (False, False, False)
