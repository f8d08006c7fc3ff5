"""Which replicas a node may still go to, by how far its attempts got."""

from services.router.attempts import Attempts
from services.router.values import CheckpointMessage, StepDone


def step(attempts: Attempts, number: int, *, has_checkpoint: bool = True) -> None:
    """The running attempt says that this step is done; the checkpoint is its name."""
    attempts.step(StepDone(number, 9, ()), CheckpointMessage(f"after {number}") if has_checkpoint else None)


async def test_one_that_fails_before_any_progress_leaves_those_that_were_not_tried() -> None:
    attempts = Attempts(lambda _: None)
    for replica_id in ("a", "b"):
        attempts.begin(replica_id)
        step(attempts, 1, has_checkpoint=False)
    assert attempts.tried == ["a", "b"]


async def test_once_one_has_got_further_those_before_it_may_be_tried_again() -> None:
    attempts = Attempts(lambda _: None)
    attempts.begin("a")
    attempts.begin("b")
    step(attempts, 1)
    assert attempts.tried == ["b"], "it fails, and the next goes to a where there are two"
    attempts.begin("a")
    assert attempts.tried == ["a"]


async def test_one_that_only_repeats_where_it_went_on_from_got_no_further() -> None:
    attempts = Attempts(lambda _: None)
    attempts.begin("a")
    step(attempts, 5)
    attempts.begin("b")
    step(attempts, 5)
    attempts.begin("a")
    step(attempts, 5)
    assert attempts.tried == ["b", "a"]


async def test_after_a_checkpoint_that_nobody_can_use_every_step_counts_again() -> None:
    attempts = Attempts(lambda _: None)
    attempts.begin("a")
    step(attempts, 5)
    attempts.begin("b")
    attempts.forget_checkpoint()
    assert (attempts.checkpoint, attempts.tried) == (None, [])
    attempts.begin("c")
    attempts.begin("b")
    step(attempts, 1)
    assert (attempts.checkpoint, attempts.tried) == ("after 1", ["b"])
