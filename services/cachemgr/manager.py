"""One cache manager: what it knows, what it is asked, and its part in the election."""

from collections.abc import Callable, Collection, Coroutine
from typing import Any

from darkroom.policy.planning import Pin, Planned
from darkroom.policy.prefetch import BanditConfig
from darkroom.policy.worth import LoadTimes
from darkroom.registry import keys
from darkroom.registry.cache_plan import PlanView
from darkroom.registry.election import Election
from darkroom.registry.membership import ClusterView
from darkroom.registry.port import Registry
from services.cachemgr.config import CacheManagerConfig
from services.cachemgr.controller import Controller
from services.cachemgr.holdings import Holdings
from services.cachemgr.hours import Hours
from services.cachemgr.ledger import Ledger
from services.cachemgr.wishes import Wishes

_BANDIT = BanditConfig(exploration_share=0.1)
"""By shares: a small model's VAE loads in a tenth of a second, a large denoiser from afar in minutes."""


class CacheManager:
    """All parts of a cache manager but its server and the model store."""

    def __init__(
        self,
        manager_id: str,
        registry: Registry,
        view: ClusterView,
        config: CacheManagerConfig,
        *,
        clock: Callable[[], float],
        on_pins: Callable[[Collection[str]], None],
    ) -> None:
        """`clock`: seconds that mean the same to every cache manager; `on_pins` is told what operators keep."""
        self.manager_id = manager_id
        guessed = LoadTimes(
            network_s=1 / config.network_bytes_per_s,
            disk_s=1 / config.disk_bytes_per_s,
            bus_s=1 / config.bus_bytes_per_s,
        )
        self.election = Election(registry, keys.ELECTION, manager_id, ttl_s=config.lease_s)
        self.ledger = Ledger(guessed, is_known=lambda name: _is_known(view, name))
        self._plans = PlanView(registry)
        self.holdings = Holdings(view, self._plans, self.ledger, guessed=guessed, clock=clock)
        self.wishes = Wishes(registry, view, clock=clock)
        planned = Planned()
        self._controller = Controller(
            registry,
            self.election,
            view,
            self.ledger,
            guessed=guessed,
            interval_s=config.plan_interval_s,
            snapshot_interval_s=config.popularity_interval_s,
            clock=clock,
            config=planned,
            hours=Hours(_BANDIT, planned, self.ledger.asked_s) if config.hour_prefetch else None,
            on_pins=on_pins,
        )

    @property
    def leader_id(self) -> str:
        """Who leads, as last seen; empty while nobody does."""
        return self.election.leader_id or ""

    @property
    def pins(self) -> tuple[Pin, ...]:
        """What operators keep on devices."""
        return self._controller.pins

    def background(self) -> list[Coroutine[Any, Any, None]]:
        """What runs beside the server, until cancelled."""
        return [self.election.run(), self._plans.run(), self._controller.run()]


def _is_known(view: ClusterView, name: str) -> bool:
    return view.model(name) is not None or view.lora(name) is not None
