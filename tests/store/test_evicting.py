"""What leaves a process's tiers: by worth or by age, with what is pinned, measured and said of the cluster."""

import threading
from typing import get_args

from darkroom.policy.appraisal import Asked
from darkroom.policy.eviction import Resident
from darkroom.policy.worth import Tier
from darkroom.store.evicting import Eviction, EvictionKind


class Hand:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def held(*names: str, size: float = 100e6) -> list[Resident]:
    """Each used by the models that its name has the letters of; the first was used longest ago."""
    return [
        Resident(name=name, size_bytes=size, used_s=float(number), models=tuple(name))
        for number, name in enumerate(names)
    ]


def nothing(_model_id: str) -> float:
    return 0.0


def test_what_nobody_asked_for_goes_by_age() -> None:
    evict = Eviction().of(Tier.HOST, nothing)
    assert evict(held("b", "a", "c"), 150e6) == ["b", "a"]


def test_what_is_asked_for_stays_whenever_it_was_used_and_by_age_it_goes() -> None:
    expected: dict[EvictionKind, list[str]] = {"worth": ["b"], "lru": ["a"]}
    for kind, going in expected.items():
        eviction = Eviction(kind, clock=Hand())
        for _ in range(5):
            eviction.ran({"a"}, 1.0)
        eviction.ran({"b"}, 1.0)
        for tier in (Tier.DEVICE, Tier.HOST, Tier.DISK):
            assert eviction.of(tier, nothing)(held("a", "b"), 1) == going


def test_what_models_share_outlives_what_they_do_not() -> None:
    eviction = Eviction(clock=Hand())
    for model_id in "ab":
        eviction.ran({model_id}, 1.0)
    evict = eviction.of(Tier.HOST, nothing)
    assert evict(held("ab", "a", "b"), 1) == ["a"]


def test_what_is_pinned_stays_and_what_it_shares_too() -> None:
    for kind in get_args(EvictionKind):
        eviction = Eviction(kind)
        evict = eviction.of(Tier.HOST, nothing)
        eviction.pin({"a"})
        assert evict(held("a", "ab", "b"), 1000e6) == ["b"]
        assert evict(held("a", "ab"), 1) == []
        eviction.pin(())
        assert evict(held("a", "b"), 1) == ["a"]


def test_what_is_said_of_the_cluster_counts_for_a_while() -> None:
    clock = Hand()
    eviction = Eviction(clock=clock)
    evict = eviction.of(Tier.DISK, nothing)
    eviction.ran({"a"}, 1.0)
    eviction.tell({"a": Asked(rate=0.0, run_s=1.0), "b": Asked(rate=1.0, run_s=1.0)}, fresh_s=30.0)
    assert evict(held("b", "a"), 1) == ["a"]
    clock.now_s += 31.0
    assert evict(held("b", "a"), 1) == ["b"]


def test_a_device_lets_go_first_of_what_host_memory_can_bring_back() -> None:
    eviction = Eviction(clock=Hand())
    eviction.ran({"a", "b"}, 1.0)
    in_host = {"a": 0.0, "b": 50e6}
    eviction.of(Tier.HOST, lambda model_id: in_host[model_id])
    evict = eviction.of(Tier.DEVICE, nothing)
    assert evict(held("a", "b"), 1) == ["b"]
    in_host["b"] = 40e6  # less than half of it
    assert evict(held("a", "b"), 1) == ["a"]


def test_what_loads_take_is_measured() -> None:
    """Where the disk is slower than was guessed, host memory matters more to a device."""
    eviction = Eviction(clock=Hand())
    eviction.ran({"a"}, 1.0)
    for _ in range(20):
        eviction.ran({"b"}, 1.0)
    eviction.of(Tier.HOST, {"a": 0.0, "b": 1e9}.__getitem__)
    evict = eviction.of(Tier.DEVICE, nothing)
    guessed = evict(held("b", "a"), 1)
    for _ in range(4):
        eviction.loaded(Tier.HOST, int(1e9), 20.0)
    assert (guessed, evict(held("b", "a"), 1)) == (["a"], ["b"])


def test_threads_may_ask_and_tell_at_once() -> None:
    eviction, failures = Eviction(), []
    evict = eviction.of(Tier.HOST, nothing)

    def work(start: int) -> None:
        try:
            for number in range(start, start + 300):
                name = chr(97 + number % 26)
                eviction.ran({name, f"{number}"}, 0.1)
                eviction.loaded(Tier.HOST, number, 0.1)
                evict(held(*"abcdef"), 1)
        except Exception as error:  # noqa: BLE001 - whatever it is, the test shows it
            failures.append(error)

    threads = [threading.Thread(target=work, args=(1000 * number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
