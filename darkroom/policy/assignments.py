"""What was sent to replicas and is not answered yet, and what the answers taught. Pure: no clock, no I/O.

The router and the simulator's model of a live cluster place requests by this. A router knows only what it sends itself.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from darkroom.policy.eviction import Resident, least_valuable
from darkroom.policy.forecast import Expected, Forecast, Wanted
from darkroom.policy.placement import Candidate
from darkroom.policy.popularity import Popularity
from darkroom.policy.worth import LoadTimes, Tier, Worth, WorthConfig

_DISPLACED_WEIGHT = 0.3
"""Of what later requests lose, against what this one does."""
_NO_TIMES = LoadTimes(network_s=0.0, disk_s=0.0, bus_s=0.0)
"""Loads are forecast instead, by stage and model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldModel:
    """Another model on a replica's device, which may have to leave."""

    model_id: str
    size_bytes: float
    back: Tier
    """Where it would be loaded from again."""
    other_count: int
    """Other replicas that have it on their devices."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Announced:
    """What a replica says of itself, as far as it matters to requests for one model."""

    replica_id: str
    tier: Tier | None
    """The nearest that has the model; None where the replica says nothing of tiers."""
    room_bytes: float | None = None
    """Of its device; None where nothing has to leave it."""
    held: tuple[HeldModel, ...] = ()
    """Other models on its device, where it has a bound."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sent:
    """A request at a replica."""

    replica_id: str
    wanted: Wanted
    tier: Tier | None
    """Where the model was when it was sent."""
    is_alone: bool
    """Whether it found no others of this router there, nor a load begun for it."""
    start_s: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prepared:
    """A load that a replica was asked to begin, for a request that is still to be run elsewhere first."""

    replica_id: str
    wanted: Wanted
    tier: Tier | None
    """Where the model was when it was asked."""
    is_first: bool
    """Whether this router knew of no such load there, and of no request."""
    start_s: float


@dataclass(slots=True)
class _Load:
    """A model on its way to a device, for requests of this router."""

    tier: Tier | None
    """Where it came from."""
    since_s: float
    is_done: bool = False
    """Whether its replica has had the model on its device meanwhile. Where it has not any more, it has to load anew."""
    waiting_count: int = 0


class Assignments:
    """The requests of one router."""

    def __init__(self) -> None:
        self._forecast = Forecast()
        self._running: Counter[str] = Counter()
        self._loads: dict[tuple[str, str], _Load] = {}
        """By replica and model; one may be done already, which its replica says."""
        self._coming: list[Prepared] = []
        """What is prepared for requests that were not sent yet."""
        self._worths: dict[str, Worth] = {}
        """By stage."""

    @property
    def running(self) -> Mapping[str, int]:
        """Requests that are not answered, by replica."""
        return dict(self._running)

    def run_s(self, wanted: Wanted) -> float:
        """What it usually takes alone, without a load."""
        return self._forecast.run_s(wanted)

    def candidate(
        self, announced: Announced, wanted: Wanted, now_s: float, *, is_suspect: bool, is_ahead: bool = False
    ) -> Candidate:
        """The replica as placement sees it: a load that it has begun costs only what is left of it.

        `is_ahead`: of a request that is still to be run elsewhere first. Others that are will be there too by then.
        """
        load = self._load(announced, wanted)
        coming_count = sum(each.replica_id == announced.replica_id for each in self._coming) if is_ahead else 0
        expected = Expected(
            replica_id=announced.replica_id,
            running_count=self._running[announced.replica_id] + coming_count,
            tier=load.tier if load else announced.tier,
            loading_s=now_s - load.since_s if load else 0.0,
            displaced_s=0.0 if load else self._displaced_s(announced, wanted, now_s),
            is_suspect=is_suspect,
        )
        return self._forecast.candidate(expected, wanted)

    def prepare(self, announced: Announced, wanted: Wanted, now_s: float) -> Prepared:
        """Notes that the replica is asked to load for a request to come. `came` and `call_off` it in any case."""
        is_first = not self._running[announced.replica_id] and not self._load(announced, wanted)
        self._join_load(announced, wanted, now_s)
        prepared = Prepared(
            replica_id=announced.replica_id, wanted=wanted, tier=announced.tier, is_first=is_first, start_s=now_s
        )
        self._coming.append(prepared)
        return prepared

    def loaded(self, prepared: Prepared, now_s: float) -> None:
        """Learns from a load that was asked for and begun."""
        if prepared.is_first and prepared.tier is not Tier.DEVICE:
            self._forecast.add_load(prepared.wanted, now_s - prepared.start_s, prepared.tier)

    def came(self, prepared: Prepared) -> None:
        """Notes that the request is not to come any more: it is there, or gone elsewhere."""
        self._coming = [other for other in self._coming if other is not prepared]

    def call_off(self, prepared: Prepared) -> None:
        """Counts on the load no more."""
        self.came(prepared)
        self._leave_load(prepared.replica_id, prepared.wanted, prepared.tier)

    def send(self, announced: Announced, wanted: Wanted, now_s: float) -> Sent:
        """Notes that a request goes to the replica. `close` it in any case."""
        replica_id = announced.replica_id
        is_alone = not self._running[replica_id] and not self._load(announced, wanted)
        self._join_load(announced, wanted, now_s)
        self._running[replica_id] += 1
        return Sent(replica_id=replica_id, wanted=wanted, tier=announced.tier, is_alone=is_alone, start_s=now_s)

    def answered(self, sent: Sent, now_s: float) -> None:
        """Learns from an answer."""
        wanted = sent.wanted
        if sent.is_alone:
            self._forecast.add(wanted, now_s - sent.start_s, sent.tier)
        self._worth(wanted.stage).add(wanted.model_id, now_s, self._forecast.run_s(wanted))

    def close(self, sent: Sent) -> None:
        """Notes that a request is at the replica no more, answered or not."""
        self._running[sent.replica_id] -= 1
        if not self._running[sent.replica_id]:
            del self._running[sent.replica_id]
        self._leave_load(sent.replica_id, sent.wanted, sent.tier)

    def _load(self, announced: Announced, wanted: Wanted) -> _Load | None:
        """The model's load that runs at the replica. Notes if the replica says that it is done."""
        load = self._loads.get((announced.replica_id, wanted.model_id))
        if load and announced.tier is Tier.DEVICE:
            load.is_done = True
        return load if load and not load.is_done else None

    def _join_load(self, announced: Announced, wanted: Wanted, now_s: float) -> None:
        if announced.tier is Tier.DEVICE:
            return
        load = self._loads.setdefault((announced.replica_id, wanted.model_id), _Load(announced.tier, now_s))
        if load.is_done:
            load.tier, load.since_s, load.is_done = announced.tier, now_s, False
        load.waiting_count += 1

    def _leave_load(self, replica_id: str, wanted: Wanted, tier: Tier | None) -> None:
        if tier is Tier.DEVICE:
            return
        load = self._loads[replica_id, wanted.model_id]
        load.waiting_count -= 1
        if not load.waiting_count:
            del self._loads[replica_id, wanted.model_id]

    def _displaced_s(self, announced: Announced, wanted: Wanted, now_s: float) -> float:
        """What later requests lose by a load there, if the least valuable leaves for it."""
        if announced.room_bytes is None or announced.tier is Tier.DEVICE:
            return 0.0
        needed_bytes = wanted.size_bytes + sum(model.size_bytes for model in announced.held) - announced.room_bytes
        if needed_bytes <= 0:
            return 0.0
        values = {model.model_id: self._value_s(wanted.stage, model, now_s) for model in announced.held}
        residents = [
            Resident(name=model.model_id, size_bytes=model.size_bytes, used_s=0.0, value_s=values[model.model_id])
            for model in announced.held
        ]
        return _DISPLACED_WEIGHT * sum(values[name] for name in least_valuable(residents, needed_bytes))

    def _value_s(self, stage: str, model: HeldModel, now_s: float) -> float:
        part = Wanted(stage=stage, model_id=model.model_id, work=1.0, size_bytes=model.size_bytes)
        missed = self._worth(stage).missed_share(model.model_id, Tier.DEVICE, model.other_count, now_s)
        return missed * self._forecast.load_s(part, model.back)

    def _worth(self, stage: str) -> Worth:
        return self._worths.setdefault(stage, Worth(Popularity(), _NO_TIMES, WorthConfig()))
