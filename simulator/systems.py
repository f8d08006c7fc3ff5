"""Every way to serve that is compared, by name."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from darkroom.policy.planning import Planned
from darkroom.policy.prefetch import BanditConfig
from simulator import baselines
from simulator.cluster import Service
from simulator.costs import BASE_BYTES, DIRECT, FREE, PRODUCTION, Work
from simulator.fleet import FleetConfig, anywhere, warmest
from simulator.live import LiveConfig
from simulator.ours import Darkroom, DarkroomConfig
from simulator.served import Served
from simulator.workload import Request

Make = Callable[[Sequence[Request]], Service]

_OURS = DarkroomConfig()
_BATCHED = replace(_OURS, work=Work(marginal=0.456), max_images=8)
"""Four guided pictures in a step cost 2.37 times one: measured on `models/shapes`, one thread of a CPU."""


def _baseline(choose: baselines.Choose, order: baselines.Order) -> Make:
    return lambda _requests: baselines.Baseline(choose, order)


def _oracle(requests: Sequence[Request]) -> Service:
    return baselines.Baseline(baselines.locality, baselines.Future(requests))


def _ours(config: DarkroomConfig) -> Make:
    return lambda requests: Darkroom(config, requests)


BASELINES: Mapping[str, Make] = {
    "lru": _baseline(baselines.least_loaded, baselines.by_recency),
    "lru-random": _baseline(baselines.any_worker, baselines.by_recency),
    "lru-homes": _baseline(baselines.homes, baselines.by_recency),
    "lru-locality": _baseline(baselines.locality, baselines.by_recency),
    "lfu-locality": _baseline(baselines.locality, baselines.by_count),
    "popularity-locality": _baseline(baselines.locality, baselines.by_popularity),
    "oracle-locality": _oracle,
}
"""As production serves: turn by turn, plain loads. `lru` is the production baseline; `lru-homes` has its
hot-model paradox: whoever is popular waits for its own two workers, however warm they are."""

OURS: Mapping[str, Make] = {"darkroom": _ours(_OURS), "darkroom-batched": _ours(_BATCHED)}

ABLATIONS: Mapping[str, Make] = {
    "without-loader": _ours(replace(_OURS, loader=replace(PRODUCTION, overlaps=True))),
    "without-overlap": _ours(replace(_OURS, loader=replace(_OURS.loader, overlaps=False))),
    "without-displacement": _ours(replace(_OURS, displaced_weight=0.0)),
    "without-worth": _ours(replace(_OURS, eviction="recency")),
    "without-plan": _ours(replace(_OURS, plan_every_s=0.0)),
    "without-prefetch-from-afar": _ours(replace(_OURS, plan=replace(_OURS.plan, least_gains_s=(0.05, 0.05, 1e9)))),
    "without-margin": _ours(replace(_OURS, plan=replace(_OURS.plan, margin=1.0))),
}
"""Darkroom with one part off."""

ADDITIONS: Mapping[str, Make] = {
    "with-hours": _ours(replace(_OURS, bandit=BanditConfig(slot_s=900.0))),
    "with-merged-pairs": _ours(replace(_OURS, merges=True)),
    "with-plans-every-5-s": _ours(replace(_OURS, plan_every_s=5.0)),
}
"""Darkroom with a part that is off, for it has not earned its place; and with plans as often as its services make."""

_ANY = FleetConfig(choose=anywhere, prepares=False)
_AWARE = FleetConfig(choose=warmest, prepares=True)

SCALED: Mapping[str, Make] = {
    "lru-scaled": lambda _requests: baselines.Baseline(baselines.least_loaded, baselines.by_recency, fleet=_ANY),
    "locality-scaled": lambda _requests: baselines.Baseline(baselines.locality, baselines.by_recency, fleet=_ANY),
    "darkroom-scaled": _ours(replace(_OURS, fleet=_AWARE)),
    "darkroom-scaled-anywhere": _ours(replace(_OURS, fleet=replace(_AWARE, choose=anywhere))),
    "darkroom-scaled-unprepared": _ours(replace(_OURS, fleet=replace(_AWARE, prepares=False))),
}
"""Two workers at least, and as many more of all machines as the waiting work asks for, by one rule for all."""

_SERVED = LiveConfig(loader=DIRECT, work=_BATCHED.work, max_images=_BATCHED.max_images, model_bytes=int(BASE_BYTES))

SERVED: Mapping[str, Make] = {
    "darkroom-as-served": lambda requests: Served(_SERVED, requests, Planned()),
    "darkroom-as-served-without-plans": lambda requests: Served(_SERVED, requests, None),
}
"""`darkroom-batched` with what its services know of each other, and no more."""

LIMITS: Mapping[str, Make] = {
    "all-warm": _ours(replace(_OURS, loader=FREE, plan_every_s=0.0, displaced_weight=0.0)),
    "knows-the-future": _ours(replace(_OURS, eviction="future")),
}
"""What nobody can reach: no load ever costs anything; evictions know what comes."""

SYSTEMS: Mapping[str, Make] = {**BASELINES, **OURS, **ABLATIONS, **ADDITIONS, **SCALED, **SERVED, **LIMITS}
