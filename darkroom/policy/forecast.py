"""How long a request will take on a replica, learned from those that are done. Pure: no clock, no I/O.

A request's run is its amount of work times what a unit of it took lately, per stage and model; a load is what the last
ones of the model took from the same tier, or is guessed by its size. Requests that share a device slow each other: by
how much, one number says.
"""

from dataclasses import dataclass
from typing import TypeVar

from darkroom.policy.placement import Candidate
from darkroom.policy.worth import Tier

K = TypeVar("K")

_WEIGHT = 0.2
"""Of the newest sample in an average."""
_COMPANY = 0.5
"""What one request more at a replica costs each, as a share of a request alone: between a batch and a queue."""
_UNKNOWN_RUN_S = 1.0
_LOAD_S = 0.3
"""What any load takes, however small, of those that nobody has seen yet."""
_BYTES_PER_S = {Tier.HOST: 10e9, Tier.DISK: 0.5e9, Tier.REMOTE: 0.25e9}
"""How fast bytes come from a tier to the device, networks being built included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a replica is to do for one request."""

    stage: str
    model_id: str
    work: float
    """How much there is to run, in units of the stage."""
    size_bytes: float
    """Of the stage's part of the model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What a router knows of one replica, for one request."""

    replica_id: str
    running_count: int
    """Requests this router has sent there and not got back."""
    tier: Tier | None
    """The nearest that has the model, or had when its load began; None where the replica says nothing of tiers."""
    loading_s: float = 0.0
    """For how long it has been on its way to the device."""
    displaced_s: float = 0.0
    """What later requests lose by what a load pushes out."""
    is_suspect: bool
    """Whether a call to it failed a moment ago."""


class Forecast:
    """Averages of run and load times."""

    def __init__(self) -> None:
        self._unit_s: dict[tuple[str, str], float] = {}
        self._load_s: dict[tuple[str, str, Tier | None], float] = {}

    def add(self, wanted: Wanted, seconds: float, tier: Tier | None) -> None:
        """Notes that a request alone at a replica took so long, a load from `tier` included."""
        key = (wanted.stage, wanted.model_id)
        if tier is Tier.DEVICE:
            _average(self._unit_s, key, seconds / wanted.work)
        elif key in self._unit_s:
            self.add_load(wanted, max(seconds - self._unit_s[key] * wanted.work, 0.0), tier)

    def add_load(self, wanted: Wanted, seconds: float, tier: Tier | None) -> None:
        """Notes that a load from `tier` alone took so long."""
        _average(self._load_s, (wanted.stage, wanted.model_id, tier), seconds)

    def run_s(self, wanted: Wanted) -> float:
        """Of so much work, alone; of a model not seen yet, what a stage's others take."""
        of_stage = [unit_s for (stage, _), unit_s in self._unit_s.items() if stage == wanted.stage]
        unknown_s = max(of_stage, default=_UNKNOWN_RUN_S / wanted.work)
        return self._unit_s.get((wanted.stage, wanted.model_id), unknown_s) * wanted.work

    def load_s(self, wanted: Wanted, tier: Tier | None) -> float:
        """To the device. What was seen of one tier never puts a farther one before it."""
        seen = {each: self._load_s.get((wanted.stage, wanted.model_id, each)) for each in (tier, *Tier)}
        if (known_s := seen[tier]) is not None:
            return known_s
        guessed_s = _guessed_s(tier, wanted.size_bytes)
        if tier is None:
            return guessed_s
        for nearer in reversed(Tier):
            if nearer < tier and (nearer_s := seen[nearer]) is not None:
                return nearer_s + guessed_s - _guessed_s(nearer, wanted.size_bytes)
        for farther in Tier:
            if farther > tier and (farther_s := seen[farther]) is not None:
                return farther_s * guessed_s / _guessed_s(farther, wanted.size_bytes)
        return guessed_s

    def candidate(self, expected: Expected, wanted: Wanted) -> Candidate:
        """The replica as placement sees it."""
        run_s, load_s = self.run_s(wanted), self.load_s(wanted, expected.tier)
        swap_s = 0.0 if expected.tier is None else min(self.load_s(wanted, min(expected.tier, Tier.HOST)), load_s)
        swap_left_s = min(swap_s, max(load_s - expected.loading_s, 0.0))
        return Candidate(
            replica_id=expected.replica_id,
            queue_s=_COMPANY * expected.running_count * run_s,
            prepare_s=max(load_s - swap_s - expected.loading_s, 0.0),
            swap_s=swap_left_s,
            run_s=run_s,
            displaced_s=expected.displaced_s,
            is_suspect=expected.is_suspect,
        )


def _guessed_s(tier: Tier | None, size_bytes: float) -> float:
    """By size; a load from who knows where counts as one from disk."""
    return 0.0 if tier is Tier.DEVICE else _LOAD_S + size_bytes / _BYTES_PER_S[Tier.DISK if tier is None else tier]


def _average(known: dict[K, float], key: K, value: float) -> None:
    known[key] = value if key not in known else known[key] + _WEIGHT * (value - known[key])
