"""What the hour of the day brings near: plays, what came of them, and what a plan lets them do."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from darkroom.policy.cacheplan import NO_PLAN, CachePlan, Order
from darkroom.policy.habits import Habits, Memory, Offer, Play
from darkroom.policy.hourly import offers, orders, watch
from darkroom.policy.plan import PlanConfig
from darkroom.policy.planning import CacheReplica, Situation
from darkroom.policy.popularity import Popularity
from darkroom.policy.prefetch import BanditConfig
from darkroom.policy.worth import LoadTimes, Tier, Worth, WorthConfig

HOUR_S = 3600.0
NINE_S = 9 * HOUR_S
CONFIG = BanditConfig(exploration_share=0.1)
TIMES = LoadTimes(network_s=10e-9, disk_s=2e-9, bus_s=1e-9)
GIB = float(1 << 30)
MODELS = tuple(f"m{number}" for number in range(20))
WARM = ("m1", "m2", "m3", "m4", "m5")
"""Of twenty models asked for the less the higher their number, those after the first."""


def offer(name: str, *node_ids: str, saved_s: float = 8.0) -> Offer:
    return Offer(name=name, tier=Tier.HOST, node_ids=node_ids or ("n1",), saved_s=saved_s, moved_s=saved_s)


def before(hour: int, **known: object) -> Habits:
    """Somebody who has watched since the hour before."""
    return Habits(CONFIG, Memory(slot_number=hour - 1, **known))  # type: ignore[arg-type]


def day_of(habits: Habits, day: int, *, is_used: bool, name: str = "a") -> tuple[Play, ...]:
    """Plays at 9 o'clock, and what comes of them by 10."""
    habits.next_slot([], (24 * day + 8) * HOUR_S)
    plays = habits.next_slot([offer(name)], (24 * day + 9) * HOUR_S)
    for play in plays:
        habits.arrived(play.name, play.since_s + 10.0)
        if is_used:
            habits.used(play.name, play.node_id)
    habits.next_slot([], (24 * day + 10) * HOUR_S)
    return plays


def test_what_was_used_is_played_again_and_what_was_not_is_not() -> None:
    habits = Habits(CONFIG)
    assert [len(day_of(habits, day, is_used=True)) for day in range(5)] == [1] * 5
    assert day_of(habits, 5, is_used=True)[0].reason == "by the hour: +7.20 s a play of 5 in slot 9"
    in_vain = Habits(CONFIG)
    assert [len(day_of(in_vain, day, is_used=False)) for day in range(5)] == [1, 0, 0, 0, 0]


def test_a_use_counts_only_where_the_model_was_brought_and_after_it_came() -> None:
    for arrives, node_id, reward in ((True, "n1", 7.2), (True, "n2", -0.8), (False, "n1", None)):
        habits = before(9)
        habits.next_slot([offer("a")], 9 * HOUR_S)
        if arrives:
            habits.arrived("a", 9 * HOUR_S + 5)
        habits.used("a", node_id)
        habits.used("b", node_id)
        habits.next_slot([], 10 * HOUR_S)
        expected = {} if reward is None else {("a", 9): pytest.approx((reward,))}
        assert habits.memory(10).arms == expected


def test_a_slot_that_nobody_watched_teaches_nothing_and_the_next_is_not_played() -> None:
    for ended_at, plays, arms in ((10, 1, 1), (11, 0, 0)):
        habits = before(9)
        habits.next_slot([offer("a")], 9 * HOUR_S)
        habits.arrived("a", 9 * HOUR_S + 5)
        assert len(habits.next_slot([offer("b")], ended_at * HOUR_S)) == plays
        assert len(habits.memory(10).arms) == arms


def test_a_slot_begins_once_and_nodes_get_one_play_each() -> None:
    assert Habits(CONFIG).due_at_s() == -float("inf")
    habits = before(9)
    plays = habits.next_slot([offer("a", "n1"), offer("b", "n1", "n2"), offer("c", "n2", "n1")], 9.5 * HOUR_S)
    assert [(play.name, play.node_id) for play in plays] == [("a", "n1"), ("b", "n2")]
    assert habits.due_at_s() == 10 * HOUR_S


def test_whoever_goes_on_with_the_memory_does_the_same() -> None:
    habits = Habits(CONFIG)
    assert day_of(habits, 0, is_used=True)
    assert habits.next_slot([offer("b")], 11 * HOUR_S)
    other = Habits(CONFIG, habits.memory(10))
    for each in (habits, other):
        each.arrived("b", 11.5 * HOUR_S)
        each.used("b", "n1")
        each.next_slot([], 12 * HOUR_S)
    assert other.memory(10) == habits.memory(10)
    assert day_of(other, 1, is_used=True) == day_of(habits, 1, is_used=True)


def replica(
    replica_id: str, *, device: Sequence[str] = (), host: Sequence[str] = (), disk: Sequence[str] = MODELS
) -> CacheReplica:
    """One with a device of its own, room for 4 models on it and 3 in host memory."""
    held = tuple(dict.fromkeys(names, GIB) for names in (device, host, disk))
    return CacheReplica(
        replica_id=replica_id,
        stage="denoiser",
        is_idle=True,
        rooms=(4 * GIB, 3 * GIB, 640 * GIB),
        held=(held[0], held[1], held[2]),
    )


def one_memory(replica_id: str, *, device: Sequence[str] = ()) -> CacheReplica:
    own = replica(replica_id, device=device)
    return replace(
        own,
        rooms=(own.rooms[0], float("inf"), own.rooms[2]),
        held=(own.held[0], own.held[2], own.held[2]),
        is_one_memory=True,
    )


def situation(*replicas: CacheReplica, counts: Mapping[str, int] | None = None) -> Situation:
    worth = Worth(Popularity(), TIMES, WorthConfig())
    for name, count in (counts or {name: 40 - 2 * n for n, name in enumerate(MODELS)}).items():
        worth.add(name, 0.0, 2.0, count)
    return Situation(replicas=replicas, sizes={"denoiser": dict.fromkeys(MODELS, GIB)}, worths={"denoiser": worth})


def offered(*replicas: CacheReplica, plan: CachePlan = NO_PLAN) -> dict[str, tuple[Tier, list[str]]]:
    found = offers(situation(*replicas), "denoiser", plan, 1.0, PlanConfig())
    return {each.name: (each.tier, list(each.node_ids)) for each in found}


def test_warm_models_are_offered_one_tier_nearer_than_they_are_anywhere() -> None:
    found = offered(
        replica("r1", disk=("m0", "m1", "m2", "m3"), host=("m1",)),
        replica("r2", disk=("m0", "m1", "m2"), device=("m3",)),
    )
    assert found == {
        "m2": (Tier.HOST, ["r2", "r1"]),
        "m4": (Tier.DISK, ["r2", "r1"]),
        "m5": (Tier.DISK, ["r2", "r1"]),
    }
    saved = {o.name: o for o in offers(situation(replica("r1", disk=("m2",))), "denoiser", NO_PLAN, 1.0, PlanConfig())}
    assert (saved["m2"].saved_s, saved["m2"].moved_s) == pytest.approx((2e-9 * GIB, 2e-9 * GIB))
    assert (saved["m4"].saved_s, saved["m4"].moved_s) == pytest.approx((8e-9 * GIB, 10e-9 * GIB))


def test_only_a_memory_that_is_also_the_hosts_is_offered_a_device_and_only_its_free_room() -> None:
    assert offered(one_memory("r1", device=("m1",))) == dict.fromkeys(WARM[1:], (Tier.DEVICE, ["r1"]))
    assert offered(one_memory("r1", device=("m16", "m17", "m18", "m19"))) == {}
    assert offered(replica("r1", host=MODELS)) == {}


def test_a_full_host_gives_up_only_what_the_plan_would_give_up() -> None:
    popular = situation(replica("r1", host=("m0", "m1", "m2")))
    rare = situation(replica("r1", host=("m17", "m18", "m19")), counts={**dict.fromkeys(MODELS, 1), "m0": 90, "m1": 50})
    assert offers(popular, "denoiser", NO_PLAN, 1.0, PlanConfig()) == []
    assert {"m1"} <= {each.name for each in offers(rare, "denoiser", NO_PLAN, 1.0, PlanConfig())}


def test_what_is_busy_loads_or_rests_is_offered_nothing() -> None:
    order = Order(replica_id="r1", model_id="m9", tier=Tier.HOST, until_s=99.0, reason="")
    done = replace(order, model_id="m1", is_done=True)
    assert offered(replace(replica("r1"), is_idle=False)) == {}
    assert offered(replica("r1"), plan=CachePlan(orders=(order,))) == {}
    assert offered(replica("r1"), plan=CachePlan(orders=(done,))).keys() == set(WARM[1:])


def play(tier: Tier) -> Habits:
    habits = before(9)
    habits.next_slot([Offer(name="m1", tier=tier, node_ids=("r1",), saved_s=2.0, moved_s=2.0)], NINE_S)
    return habits


def seen(habits: Habits, here: CacheReplica, asked_s: float | None, now_s: float) -> tuple[bool, bool]:
    """`asked_s`, `now_s`: after the play began."""
    asked = {} if asked_s is None else {"m1": NINE_S + asked_s}
    watch(habits, [here], asked.get, NINE_S + now_s)
    (found,) = habits.plays
    return found.arrived_s is not None, found.is_used


def test_a_play_has_paid_when_the_model_came_to_the_device_and_was_asked_for_since() -> None:
    habits, in_memory, ready = play(Tier.HOST), replica("r1", host=("m1",)), replica("r1", device=("m1",))
    assert seen(habits, replica("r1"), None, 5.0) == (False, False)
    assert seen(habits, in_memory, None, 10.0) == (True, False)
    assert seen(habits, in_memory, 20.0, 25.0) == (True, False)
    assert seen(habits, ready, None, 26.0) == (True, False)
    assert seen(habits, ready, 9.0, 27.0) == (True, False)
    assert seen(habits, ready, 28.0, 30.0) == (True, True)
    assert seen(habits, in_memory, 28.0, 40.0) == (True, True)


def test_what_requests_may_have_brought_is_not_the_plays() -> None:
    in_memory, ready = replica("r1", host=("m1",)), replica("r1", device=("m1",))
    assert seen(play(Tier.HOST), ready, 8.0, 10.0) == (False, False)
    assert seen(play(Tier.HOST), replace(in_memory, is_idle=False), None, 10.0) == (False, False)
    assert seen(play(Tier.HOST), in_memory, 8.0, 10.0) == (False, False)
    assert seen(play(Tier.DEVICE), ready, None, 10.0) == (True, False)
    assert seen(play(Tier.HOST), replica("r2", host=("m1",)), None, 10.0) == (False, False)


def test_orders_say_why() -> None:
    (order,) = orders(play(Tier.DISK).plays, 5.0, 120.0)
    assert (order.replica_id, order.model_id, order.tier, order.until_s) == ("r1", "m1", Tier.DISK, 125.0)
    assert order.reason == "by the hour: never tried in slot 9"
    assert not order.is_wished


NAMES = st.lists(st.sampled_from(MODELS), unique=True, max_size=3)


@settings(max_examples=40, deadline=None)
@given(
    held=st.lists(
        st.tuples(st.booleans(), NAMES, NAMES, st.lists(st.sampled_from(MODELS), unique=True)), min_size=1, max_size=6
    ),
    arms=st.dictionaries(
        st.tuples(st.sampled_from(MODELS), st.integers(0, 2)), st.lists(st.floats(-9, 9), min_size=1, max_size=7)
    ),
    most=st.integers(1, 3),
)
def test_plays_are_few_never_for_what_is_there_and_equal_for_equal_worlds(
    held: list[tuple[bool, list[str], list[str], list[str]]],
    arms: dict[tuple[str, int], list[float]],
    most: int,
) -> None:
    replicas = [
        one_memory(f"r{n}", device=device) if is_one else replica(f"r{n}", device=device, host=host, disk=disk)
        for n, (is_one, device, host, disk) in enumerate(held)
    ]
    by_id, config = {each.replica_id: each for each in replicas}, replace(CONFIG, most_plays=most)
    runs = []
    for _ in range(2):
        habits = Habits(config, Memory(slot_number=0, arms=arms))
        found = offers(situation(*replicas), "denoiser", NO_PLAN, 1.0, PlanConfig())
        runs.append(habits.next_slot(found, HOUR_S))
    assert runs[0] == runs[1]
    assert len(runs[0]) <= most
    assert len({each.node_id for each in runs[0]}) == len(runs[0])
    for each in runs[0]:
        there = by_id[each.node_id]
        assert each.name in WARM
        assert not any(each.name in r.held[tier] for r in replicas for tier in range(each.tier + 1))
        assert each.tier is Tier.DISK or each.name in there.held[each.tier + 1]
        if each.tier is Tier.DEVICE:
            assert sum(there.held[0].values()) + GIB <= there.rooms[0]
            assert there.is_one_memory
