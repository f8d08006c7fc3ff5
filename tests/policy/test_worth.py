"""What copies are worth, who is popular, what leaves, what moves."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from darkroom.policy.eviction import Resident, least_recent, least_valuable
from darkroom.policy.plan import Move, Node, PlanConfig, plan_moves
from darkroom.policy.popularity import Band, Popularity, gini
from darkroom.policy.worth import LoadTimes, Tier, Worth, WorthConfig, blocked_share

TIMES = LoadTimes(network_s=16.0, disk_s=6.0, bus_s=1.5)


def worth(**asked: int) -> Worth:
    """Of models asked for so many times, a second apart, by requests of ten seconds."""
    known = Worth(Popularity(), TIMES, WorthConfig())
    for name, count in asked.items():
        for second in range(count):
            known.add(name, float(second), run_s=10.0)
    return known


def node(node_id: str, *, device: str = "", host: str = "", disk: str = "", idle: bool = True) -> Node:
    """A node that holds models of one letter and size 1: one on the device, two on the host, four on disk."""
    held = tuple(dict.fromkeys(names, 1.0) for names in (device, host, disk))
    return Node(node_id=node_id, is_idle=idle, is_loading=False, rooms=(1.0, 2.0, 4.0), held=held)


def moves(nodes: list[Node], known: Worth, **more: object) -> list[tuple[str, str, Tier]]:
    sizes = {name: 1.0 for n in nodes for tier in n.held for name in tier}
    made: list[Move] = plan_moves(nodes, sizes, known, 100.0, PlanConfig(**more))  # type: ignore[arg-type]
    return [(move.node_id, move.name, move.tier) for move in made]


def test_a_rate_fades_and_its_model_is_forgotten() -> None:
    popular = Popularity(windows_s=(10.0,))
    popular.add("a", 0.0)
    assert popular.rate("a", 0.0) == pytest.approx(0.1)
    assert popular.rate("a", 10.0) == pytest.approx(0.1 / 2.718281828)
    assert popular.rates(1000.0) == {}
    assert popular.rate("never", 0.0) == 0.0


def test_the_rate_of_a_steady_stream_is_its_rate() -> None:
    popular = Popularity(windows_s=(50.0, 200.0))
    for second in range(2000):
        popular.add("a", float(second), count=0.5)
    assert popular.rate("a", 2000.0) == pytest.approx(0.5, rel=0.02)


def test_bands_go_by_rank() -> None:
    popular = Popularity()
    for rank in range(40):
        popular.add(f"m{rank:02}", 0.0, count=100.0 - rank)
    bands = popular.bands(1.0)
    assert [name for name, band in bands.items() if band is Band.HOT] == ["m00", "m01"]
    assert sum(band is Band.WARM for band in bands.values()) == 10
    assert bands["m39"] is Band.COLD


def test_gini_is_0_for_equals_and_near_1_for_one_who_has_all() -> None:
    assert gini([3, 3, 3]) == pytest.approx(0)
    assert gini([0] * 99 + [5]) == pytest.approx(0.99)
    assert gini([]) == 0.0


def test_erlangs_formula() -> None:
    assert blocked_share(0, 2.0) == 1.0
    assert blocked_share(1, 1.0) == pytest.approx(0.5)
    assert blocked_share(5, 3.0) == pytest.approx(0.11005, abs=1e-5)  # from tables


@given(st.integers(0, 8), st.integers(1, 200), st.sampled_from([Tier.DEVICE, Tier.HOST]))
def test_a_copy_more_is_never_worth_more_than_the_one_before(others: int, count: int, tier: Tier) -> None:
    known = worth(a=count)
    assert known.missed_share("a", tier, others + 1, 200.0) <= known.missed_share("a", tier, others, 200.0)


def test_only_a_further_copy_on_a_device_goes_by_the_last_minutes() -> None:
    popular = Popularity((60.0, 6000.0))
    popular.add("burst", 0.0, 60)
    assert popular.recent_rate("burst", 0.0) == popular.rate("burst", 0.0)
    assert popular.recent_rate("burst", 600.0) < 0.01 * popular.rate("burst", 600.0)
    assert popular.recent_rate("never", 0.0) == 0.0
    ended = Worth(popular, TIMES, WorthConfig())
    ended.restore("burst", 60.0)
    assert ended.missed_share("burst", Tier.DEVICE, 1, 600.0) < 0.01 * ended.missed_share(
        "burst", Tier.DEVICE, 0, 600.0
    )
    assert ended.missed_share("burst", Tier.HOST, 1, 600.0) > 0.1 * ended.missed_share("burst", Tier.HOST, 0, 600.0)


def test_what_is_asked_for_more_often_is_worth_more() -> None:
    known = worth(a=50, b=5)
    assert known.missed_share("a", Tier.DEVICE, 0, 60.0) > known.missed_share("b", Tier.DEVICE, 0, 60.0) > 0
    assert known.missed_share("never", Tier.DEVICE, 0, 60.0) == 0


def test_losing_a_device_copy_costs_less_while_the_host_has_it() -> None:
    assert TIMES.back_s(Tier.DEVICE, [Tier.HOST]) == 1.5
    assert TIMES.back_s(Tier.DEVICE, []) == 7.5
    assert TIMES.back_s(Tier.HOST, [Tier.DEVICE]) < TIMES.back_s(Tier.HOST, []) == 6.0


def resident(name: str, size: float, value: float, used: float = 0.0) -> Resident:
    return Resident(name=name, size_bytes=size, used_s=used, value_s=value)


def test_the_least_valuable_byte_leaves_first() -> None:
    held = [resident("big", 10, 20), resident("small", 1, 3), resident("poor", 5, 1)]
    assert least_valuable(held, 5) == ["poor"]
    assert least_valuable(held, 6) == ["big"]  # the poor one's room is not needed any more
    assert least_recent([resident("old", 5, 9, used=1), resident("new", 5, 0, used=2)], 5) == ["old"]


RESIDENTS = st.lists(
    st.builds(
        Resident,
        name=st.text("abcdef", min_size=1, max_size=3),
        size_bytes=st.integers(1, 100).map(float),
        used_s=st.integers(0, 9).map(float),
        value_s=st.integers(0, 50).map(float),
    ),
    unique_by=lambda r: r.name,
)


@given(RESIDENTS, st.integers(0, 300))
def test_enough_leaves_and_nothing_that_need_not(residents: list[Resident], needed: int) -> None:
    going = least_valuable(residents, needed)
    sizes = {r.name: r.size_bytes for r in residents}
    freed = sum(sizes[name] for name in going)
    assert freed >= min(needed, sum(sizes.values()))
    assert all(freed - sizes[name] < needed for name in going)


def test_a_model_in_host_memory_moves_to_an_idle_device() -> None:
    nodes = [node("1", device="b", host="ab", disk="ab"), node("2", device="b", host="b", disk="ab")]
    assert ("1", "a", Tier.DEVICE) in moves(nodes, worth(a=60, b=1))


def test_nothing_moves_to_a_busy_device() -> None:
    nodes = [node("1", device="b", host="ab", disk="ab", idle=False)]
    assert all(tier is not Tier.DEVICE for _, _, tier in moves(nodes, worth(a=60, b=1)))


def test_equals_do_not_push_each_other_out() -> None:
    nodes = [node("1", device="b", host="ab", disk="ab")]
    assert moves(nodes, worth(a=60, b=60)) == []


def test_a_model_is_fetched_from_afar_only_where_that_gains_much() -> None:
    nodes = [node("1", device="a", host="a", disk="a"), node("2")]
    assert moves(nodes, worth(a=90), least_gains_s=(0.05, 0.05, 4.0)) == [("2", "a", Tier.DISK)]
    assert moves(nodes, worth(a=90), least_gains_s=(0.05, 0.05, 1e9)) == []


def test_each_node_gets_one_move_at_most() -> None:
    nodes = [node("1", device="c", host="abc"[:2], disk="abcd")]
    assert len(moves(nodes, worth(a=60, b=50, d=80))) == 1


def test_popularity_and_run_times_are_taken_over_by_another_who_then_goes_on() -> None:
    one, other = Popularity((10.0, 100.0)), Popularity((10.0, 100.0))
    one.add("a", 0.0, 5)
    one.add("b", 20.0)
    other.add("b", 25.0)
    kept = one.counts(30.0)
    other.restore({**kept, "c": [1.0]}, 30.0)
    assert other.rate("a", 50.0) == pytest.approx(one.rate("a", 50.0))
    assert other.rate("b", 30.0) < 2 * one.rate("b", 30.0), "what is known already stays"
    assert other.rate("c", 30.0) == 0.0, "of other windows"
    worth = Worth(one, TIMES, WorthConfig())
    worth.add("a", 30.0, 2.0, 3)
    worth.add("a", 30.0, 4.0, 100)
    assert 2.0 < worth.run_s("a") < 4.0
    worth.restore("a", 9.0)
    worth.restore("z", 9.0)
    assert worth.run_s("a") < 4.0
    assert worth.run_s("z") == 9.0
