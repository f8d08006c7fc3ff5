"""Who holds what, as answers to the cache manager's questions."""

from dataclasses import dataclass

from darkroom.errors import InvalidField, ModelNotFound, RegistryUnavailable
from darkroom.registry.catalogue import GuideEntry, LoraEntry, ModelEntry
from darkroom.registry.membership import ClusterView
from darkroom.registry.port import Member

STAGES = ("encoder", "denoiser", "vae", "controlnet")


@dataclass(frozen=True, slots=True)
class Holding:
    """A replica and the models it has loaded."""

    member: Member
    model_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Location:
    """Replicas of a stage, those that hold the model first."""

    holdings: tuple[Holding, ...]
    holder_count: int


class Holdings:
    """Answers from the cluster view. Every method raises RegistryUnavailable before the first view is complete."""

    def __init__(self, view: ClusterView) -> None:
        self._view = view

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
        return tuple(Holding(m, view.models_of(m.replica_id)) for m in view.members() if m.stage in STAGES)

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

    def _ready(self) -> ClusterView:
        if not self._view.is_ready:
            raise RegistryUnavailable("the cluster's state was not read yet")
        return self._view
