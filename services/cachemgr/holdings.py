"""Who holds what, how popular it is and what is planned, as answers to the cache manager's questions."""

from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass

from darkroom.errors import InvalidField, ModelNotFound, RegistryUnavailable
from darkroom.policy.cacheplan import CachePlan
from darkroom.policy.planning import MAIN_STAGE
from darkroom.policy.popularity import Band
from darkroom.policy.scaling import Site
from darkroom.policy.worth import LoadTimes
from darkroom.registry.cache_plan import PlanView
from darkroom.registry.catalogue import GuideEntry, LoraEntry, ModelEntry
from darkroom.registry.membership import ClusterView
from darkroom.registry.parts import PART_STAGES, stage_bytes
from darkroom.registry.port import Member
from darkroom.registry.residence import Residence
from services.cachemgr.ledger import Ledger
from services.cachemgr.situation import best_sites, load_times

STAGES = ("encoder", "denoiser", "vae", "controlnet")
_MOST = 100
"""Models, and LoRAs, whose popularity is described."""


@dataclass(frozen=True, slots=True)
class Holding:
    """A replica and the models it has."""

    member: Member
    model_ids: tuple[str, ...]
    """Those on its device."""
    residences: Mapping[str, Residence]


@dataclass(frozen=True, slots=True)
class Location:
    """Replicas of a stage, those that hold the model first."""

    holdings: tuple[Holding, ...]
    holder_count: int


@dataclass(frozen=True, slots=True)
class Asked:
    """How much a model is asked for, and where one more copy of each stage's part should go."""

    model_id: str
    band: Band
    rate: float
    sites: tuple[tuple[str, Site], ...]
    """With their stages."""


class Holdings:
    """Answers from what is known here. Every method raises RegistryUnavailable before the first view is complete."""

    def __init__(
        self, view: ClusterView, plans: PlanView, ledger: Ledger, *, guessed: LoadTimes, clock: Callable[[], float]
    ) -> None:
        """`guessed`: load times that nobody has seen; `clock`: the one of the ledger."""
        self._view, self._plans, self._ledger, self._guessed, self._clock = view, plans, ledger, guessed, clock

    def models(self) -> tuple[ModelEntry, ...]:
        """The catalogue, by id."""
        return self._ready().models()

    def loras(self) -> tuple[LoraEntry, ...]:
        """The catalogue's LoRAs, by id."""
        return self._ready().loras()

    def guides(self) -> tuple[GuideEntry, ...]:
        """The catalogue's ControlNets and IP-Adapters, by id."""
        return self._ready().guides()

    def describe(self) -> tuple[Holding, ...]:
        """Every stage replica that is up."""
        view = self._ready()
        return tuple(
            Holding(m, view.models_of(m.replica_id), view.residences_of(m.replica_id))
            for m in view.members()
            if m.stage in STAGES
        )

    def locate(self, model_id: str, stage: str) -> Location:
        """Where a model is. Raises ModelNotFound, or InvalidField for a stage that holds no models."""
        if stage not in STAGES:
            raise InvalidField("stage", f"must be one of {', '.join(STAGES)}")
        if self._ready().model(model_id) is None:
            raise ModelNotFound(model_id)
        of_stage = [holding for holding in self.describe() if holding.member.stage == stage]
        holders = [holding for holding in of_stage if model_id in holding.model_ids]
        others = [holding for holding in of_stage if model_id not in holding.model_ids]
        return Location((*holders, *others), len(holders))

    def plan(self) -> CachePlan:
        """The plan as last seen."""
        return self._plans.plan

    def plans(self) -> AsyncIterator[CachePlan]:
        """The plan as soon as the registry was read, then each that replaces it."""
        return self._plans.changes()

    def asked(self) -> list[Asked]:
        """The models asked for most, the most popular first."""
        view, now_s = self._ready(), self._clock()
        popularity = self._ledger.worth(MAIN_STAGE).popularity
        rates, bands = popularity.rates(now_s), popularity.bands(now_s)
        times = {stage: load_times(view, stage, self._guessed) for stage in PART_STAGES}
        found = []
        for model_id in sorted(rates, key=lambda name: (-rates[name], name))[:_MOST]:
            entry = view.model(model_id)
            if entry is not None:
                sizes = stage_bytes(entry)
                sites = [
                    (stage, site)
                    for stage in PART_STAGES
                    for site in best_sites(view, stage, model_id, sizes[stage], times[stage])
                ]
                found.append(Asked(model_id, bands[model_id], rates[model_id], tuple(sites)))
        return found

    def asked_loras(self) -> list[tuple[str, float]]:
        """The LoRAs asked for most, and how many requests a second."""
        rates = self._ledger.loras.rates(self._clock())
        return sorted(rates.items(), key=lambda item: (-item[1], item[0]))[:_MOST]

    def _ready(self) -> ClusterView:
        if not self._view.is_ready:
            raise RegistryUnavailable("the cluster's state was not read yet")
        return self._view
