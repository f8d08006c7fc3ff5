"""What a router expects of replicas, by what they announce, what it has sent them, and what came back."""

from dataclasses import replace

import pytest

from darkroom.policy.assignments import Announced, Assignments, HeldModel
from darkroom.policy.forecast import Wanted
from darkroom.policy.placement import Candidate
from darkroom.policy.worth import Tier

SD = Wanted(stage="vae", model_id="sd", work=1.0, size_bytes=1e9)
COLD = Announced(replica_id="a", tier=Tier.DISK)
LOAD_S = 0.3 + 2.0  # half a GB a second
TO_DEVICE_S = 0.3 + 0.1


def candidate(assignments: Assignments, announced: Announced, now_s: float = 0.0) -> Candidate:
    return assignments.candidate(announced, SD, now_s, is_suspect=False)


def test_a_load_that_runs_costs_what_is_left_of_it() -> None:
    assignments = Assignments()
    assignments.send(COLD, SD, 10.0)
    begun, moving, done = (candidate(assignments, COLD, now_s) for now_s in (10.5, 12.0, 100.0))
    assert (begun.prepare_s, begun.swap_s) == pytest.approx((LOAD_S - TO_DEVICE_S - 0.5, TO_DEVICE_S))
    assert (moving.prepare_s, moving.swap_s) == pytest.approx((0.0, LOAD_S - 2.0))
    assert done.load_s == 0.0


def test_what_a_load_has_put_on_nearer_tiers_meanwhile_does_not_count_twice() -> None:
    assignments = Assignments()
    assignments.send(replace(COLD, tier=Tier.REMOTE), SD, 10.0)
    before = candidate(assignments, replace(COLD, tier=Tier.REMOTE), 13.0)
    assert candidate(assignments, COLD, 13.0) == before
    assert candidate(assignments, replace(COLD, tier=Tier.DEVICE), 13.0).load_s == 0.0


def test_a_model_that_came_and_left_has_to_be_loaded_anew() -> None:
    assignments = asked_for(*["old"] * 9)
    prepared = assignments.prepare(COLD, SD, 10.0)
    assert candidate(assignments, replace(COLD, tier=Tier.DEVICE), 13.0).load_s == 0.0
    gone = candidate(assignments, full(OLD), 14.0)
    assert gone.load_s == pytest.approx(LOAD_S)
    assert gone.displaced_s > 0.0
    sent = assignments.send(COLD, SD, 20.0)
    assignments.call_off(prepared)
    assert candidate(assignments, COLD, 21.0).load_s == pytest.approx(LOAD_S - 1.0)
    assignments.close(sent)
    assert candidate(assignments, COLD, 21.0).load_s == pytest.approx(LOAD_S)


def test_a_load_counts_as_long_as_anybody_waits_for_it() -> None:
    assignments = Assignments()
    first, second = assignments.send(COLD, SD, 10.0), assignments.send(COLD, SD, 11.0)
    assignments.close(first)
    assert candidate(assignments, COLD, 12.0).load_s == pytest.approx(LOAD_S - 2.0)
    assignments.close(second)
    assert candidate(assignments, COLD, 12.0).load_s == pytest.approx(LOAD_S)
    assert assignments.running == {}


def test_loads_of_other_models_and_at_other_replicas_are_no_help() -> None:
    assignments = Assignments()
    assignments.send(COLD, replace(SD, model_id="flux"), 10.0)
    assignments.send(replace(COLD, replica_id="b"), SD, 10.0)
    assert candidate(assignments, COLD, 11.0).load_s == pytest.approx(LOAD_S)


def test_only_requests_that_were_alone_teach() -> None:
    assignments = Assignments()
    warm = replace(COLD, tier=Tier.DEVICE)
    alone, beside = assignments.send(warm, SD, 0.0), assignments.send(warm, SD, 0.0)
    assignments.answered(beside, 50.0)
    assert assignments.run_s(SD) == 1.0
    assignments.answered(alone, 4.0)
    assert assignments.run_s(SD) == 4.0


def full(*held: HeldModel, room_bytes: float = 1e9) -> Announced:
    return replace(COLD, held=held, room_bytes=room_bytes)


OLD = HeldModel(model_id="old", size_bytes=1e9, back=Tier.DISK, other_count=0)


def asked_for(*names: str) -> Assignments:
    assignments = Assignments()
    for name in names:
        sent = assignments.send(Announced(replica_id="a", tier=Tier.DEVICE), replace(SD, model_id=name), 0.0)
        assignments.answered(sent, 1.0)
        assignments.close(sent)
    return assignments


def test_what_a_load_pushes_out_is_what_is_worth_least() -> None:
    assignments = asked_for(*["old"] * 9, "older")
    one, two = (
        candidate(assignments, full(OLD, *more, room_bytes=2e9)) for more in ((), (replace(OLD, model_id="older"),))
    )
    assert one.displaced_s == 0.0, "there is room"
    only_old = candidate(assignments, full(OLD))
    assert 0.0 < two.displaced_s < only_old.displaced_s <= 0.3 * LOAD_S


def test_nothing_is_pushed_out_for_what_is_there_or_coming_or_where_nothing_leaves() -> None:
    assignments = asked_for(*["old"] * 9)
    assert candidate(assignments, full(OLD)).displaced_s > 0.0
    assert candidate(assignments, replace(full(OLD), tier=Tier.DEVICE)).displaced_s == 0.0
    assert candidate(assignments, replace(full(OLD), room_bytes=None)).displaced_s == 0.0
    assignments.send(full(OLD), SD, 1.0)
    assert candidate(assignments, full(OLD), 1.0).displaced_s == 0.0


def test_what_comes_back_soon_or_is_elsewhere_too_is_cheap_to_push_out() -> None:
    assignments = asked_for(*["old"] * 9)
    lost = candidate(assignments, full(OLD)).displaced_s
    assert candidate(assignments, full(replace(OLD, back=Tier.HOST))).displaced_s < lost
    assert candidate(assignments, full(replace(OLD, other_count=1))).displaced_s < lost


def ahead(assignments: Assignments, announced: Announced, wanted: Wanted = SD) -> Candidate:
    """As placement sees a replica for a request that is still to be run elsewhere first."""
    return assignments.candidate(announced, wanted, 0.0, is_suspect=False, is_ahead=True)


def test_a_load_begun_ahead_costs_its_request_what_is_left_of_it() -> None:
    assignments = Assignments()
    prepared = assignments.prepare(COLD, SD, 10.0)
    assert candidate(assignments, COLD, 11.0).load_s == pytest.approx(LOAD_S - 1.0)
    assignments.came(prepared)
    sent = assignments.send(COLD, SD, 11.0)
    assignments.call_off(prepared)
    assert candidate(assignments, COLD, 12.0).load_s == pytest.approx(LOAD_S - 2.0), "it began before its request came"
    assignments.close(sent)
    assert candidate(assignments, COLD, 12.0).load_s == pytest.approx(LOAD_S)


def test_a_load_that_is_called_off_is_not_counted_on() -> None:
    assignments = Assignments()
    assignments.call_off(assignments.prepare(COLD, SD, 10.0))
    assert candidate(assignments, COLD, 11.0).load_s == pytest.approx(LOAD_S)
    assert ahead(assignments, COLD).queue_s == 0.0


def test_requests_to_come_spread_and_do_not_drive_away_those_that_are_here() -> None:
    assignments = Assignments()
    prepared = assignments.prepare(COLD, SD, 0.0)
    flux = replace(SD, model_id="flux")
    assert ahead(assignments, COLD, flux).queue_s > 0.0
    assert ahead(assignments, replace(COLD, replica_id="b"), flux).queue_s == 0.0
    assert candidate(assignments, COLD).queue_s == 0.0
    assert assignments.running == {}
    assignments.came(prepared)
    assert ahead(assignments, COLD, flux).queue_s == 0.0


def test_a_load_begun_ahead_teaches_how_long_loads_take_and_those_that_join_it_do_not() -> None:
    assignments = Assignments()
    first, second = assignments.prepare(COLD, SD, 0.0), assignments.prepare(COLD, SD, 4.5)
    assignments.loaded(second, 5.0)
    assert candidate(assignments, replace(COLD, replica_id="b")).load_s == pytest.approx(LOAD_S)
    assignments.loaded(first, 5.0)
    assert candidate(assignments, replace(COLD, replica_id="b")).load_s == pytest.approx(5.0)


def test_a_request_that_joins_a_load_begun_ahead_teaches_nothing() -> None:
    assignments = Assignments()
    warm = assignments.send(replace(COLD, tier=Tier.DEVICE), SD, 0.0)
    assignments.answered(warm, 1.0)
    assignments.close(warm)
    assignments.prepare(COLD, SD, 2.0)
    assignments.answered(assignments.send(COLD, SD, 3.0), 4.0)
    assert candidate(assignments, replace(COLD, replica_id="b")).load_s == pytest.approx(LOAD_S)


def test_what_is_on_the_device_is_prepared_without_a_load() -> None:
    assignments = Assignments()
    warm = replace(COLD, tier=Tier.DEVICE)
    prepared = assignments.prepare(warm, SD, 0.0)
    assignments.loaded(prepared, 9.0)
    assert candidate(assignments, COLD, 1.0).load_s == pytest.approx(LOAD_S)
    assignments.call_off(prepared)
