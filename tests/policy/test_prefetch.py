"""The bandit learns which models an hour brings, and merged pairs must be worth their room."""

from darkroom.policy.fusion import Pair, choose_fused
from darkroom.policy.prefetch import BanditConfig, HourBandit

STAKES = dict.fromkeys("abcd", 6.0)


def test_every_arm_is_tried_and_then_those_that_paid() -> None:
    bandit = HourBandit(BanditConfig(exploration_s=0.5, most_plays=2))
    slot = bandit.slot(3 * 3600.0 + 24 * 3600.0)
    assert slot == 3
    assert bandit.choose(STAKES, slot) == ["a", "b"]
    for _ in range(40):
        for name in bandit.choose(STAKES, slot):
            bandit.reward(name, slot, saved_s=5.0 if name == "c" else 0.0, moved_s=6.0)
    chosen = [bandit.choose(STAKES, slot)[0] for _ in range(20)]
    assert chosen == ["c"] * 20


def test_what_never_pays_is_left_alone_in_its_slot_and_tried_in_others() -> None:
    bandit = HourBandit(BanditConfig(exploration_s=0.1))
    for _ in range(7):
        bandit.reward("a", 3, saved_s=0.0, moved_s=20.0)
    assert bandit.choose({"a": 20.0}, 3) == []
    assert bandit.choose({"a": 20.0}, 4) == ["a"]


def test_a_habit_that_ended_is_forgotten_with_the_window() -> None:
    bandit = HourBandit(BanditConfig(window=3, exploration_s=0.1))
    for saved_s in (30.0, 30.0, 30.0):
        bandit.reward("a", 0, saved_s, moved_s=6.0)
    assert bandit.choose({"a": 30.0}, 0) == ["a"]
    for _ in range(3):
        bandit.reward("a", 0, 0.0, moved_s=20.0)
    assert bandit.choose({"a": 30.0}, 0) == []


def test_by_shares_a_window_in_vain_ends_the_plays_of_small_models_as_of_large_ones() -> None:
    """Beside a hundred others that are played in the slot all week."""
    for size_s in (0.01, 8.0, 300.0):
        bandit = HourBandit(BanditConfig(exploration_share=0.1))
        for number in range(700):
            bandit.reward(f"m{number % 100}", 0, size_s, size_s)
        tries = 0
        while bandit.choose({"a": size_s}, 0):
            bandit.reward("a", 0, 0.0, size_s)
            tries += 1
        assert 2 <= tries <= 7


def test_the_arms_played_last_are_what_others_are_told() -> None:
    bandit = HourBandit(BanditConfig(window=2))
    for name in "abcab":
        bandit.reward(name, 0, 1.0, 0.0)
    bandit.reward("b", 0, 2.0, 0.0)
    assert bandit.arms(2) == {("a", 0): (1.0, 1.0), ("b", 0): (1.0, 2.0)}
    again = HourBandit(bandit.config, bandit.arms(3))
    assert again.choose(STAKES, 0) == bandit.choose(STAKES, 0)
    again.reward("b", 0, 3.0, 0.0)
    assert again.rewards("b", 0) == (2.0, 3.0)


def pair(rate: float, displaced_s: float = 0.5) -> Pair:
    return Pair(rate=rate, adapter_s=1.0, displaced_s=displaced_s)


def test_pairs_that_save_more_than_they_push_out_are_merged() -> None:
    pairs = {"a": pair(2.0), "b": pair(1.0), "c": pair(0.2)}
    assert choose_fused(pairs, frozenset()) == ["a", "b"]
    assert choose_fused(pairs, frozenset(), most=1) == ["a"]


def test_a_merged_pair_is_not_given_up_for_one_hardly_better() -> None:
    pairs = {"a": pair(1.6), "b": pair(1.5)}
    assert choose_fused(pairs, frozenset("b"), most=1) == ["b"]
    assert choose_fused(pairs, frozenset(), most=1) == ["a"]
