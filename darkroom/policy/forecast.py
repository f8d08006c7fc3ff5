"""How long a request will take on a replica, learned from those that are done. Pure: no clock, no I/O.

A request's run is its amount of work times what a unit of it took lately, per stage and model; a load is what the last
ones of the model took, or is guessed by its size. Requests that share a device slow each other: by how much, one number
says.
"""

from dataclasses import dataclass

from darkroom.policy.placement import Candidate

_WEIGHT = 0.2
"""Of the newest sample in an average."""
_COMPANY = 0.5
"""What one request more at a replica costs each, as a share of a request alone: between a batch and a queue."""
_UNKNOWN_RUN_S = 1.0
_LOAD_S, _LOAD_BYTES_PER_S = 0.3, 0.5e9
"""Of a load nobody has seen yet: what any takes, and how fast bytes come."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What a router knows of one replica, for one request."""

    replica_id: str
    running_count: int
    """Requests this router has sent there and not got back."""
    holds_model: bool
    """Whether it has loaded the model that the request needs."""
    is_suspect: bool
    """Whether a call to it failed a moment ago."""


class Forecast:
    """Averages of run and load times."""

    def __init__(self) -> None:
        self._unit_s: dict[tuple[str, str], float] = {}
        self._load_s: dict[tuple[str, str], float] = {}

    def add(self, stage: str, model_id: str, work: float, seconds: float, *, held: bool) -> None:
        """Notes that a request alone at a replica took so long, a load included where the model was not held."""
        key = (stage, model_id)
        if held:
            _average(self._unit_s, key, seconds / work)
        elif key in self._unit_s:
            _average(self._load_s, key, max(seconds - self._unit_s[key] * work, 0.0))

    def run_s(self, stage: str, model_id: str, work: float) -> float:
        """Of so much work, alone; of a model not seen yet, what a stage's others take."""
        of_stage = [unit_s for (other, _), unit_s in self._unit_s.items() if other == stage]
        unit_s = self._unit_s.get((stage, model_id), max(of_stage, default=_UNKNOWN_RUN_S / work))
        return unit_s * work

    def load_s(self, stage: str, model_id: str, size_bytes: int) -> float:
        """Of a stage's part of a model of that size."""
        return self._load_s.get((stage, model_id), _LOAD_S + size_bytes / _LOAD_BYTES_PER_S)

    def candidate(self, expected: Expected, stage: str, model_id: str, work: float, size_bytes: int) -> Candidate:
        """The replica as placement sees it."""
        run_s = self.run_s(stage, model_id, work)
        return Candidate(
            replica_id=expected.replica_id,
            queue_s=_COMPANY * expected.running_count * run_s,
            prepare_s=0.0 if expected.holds_model else self.load_s(stage, model_id, size_bytes),
            run_s=run_s,
            is_suspect=expected.is_suspect,
        )


def _average(known: dict[tuple[str, str], float], key: tuple[str, str], value: float) -> None:
    known[key] = value if key not in known else known[key] + _WEIGHT * (value - known[key])
