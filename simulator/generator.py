"""Requests made up after the published statistics of GenTD26: the default workload, for the trace may not be shipped.

Users come in sessions: someone picks a base model, perhaps LoRAs, and asks for pictures again and again, with pauses.
How busy an hour is varies with the hour of the day and by chance.
"""

import bisect
import itertools
import math
import random
from collections.abc import Sequence

from simulator.workload import LoraUse, Request

BASE_COUNT = 86
_HOTTEST_SHARE = 0.307
_BASE_EXPONENT = 1.45
"""Of the ranks after the first: Gini 0.871 over all."""
LORA_COUNT = 389
_LORA_EXPONENT = 0.55
_LORA_COUNTS = ((0, 0.832), (1, 0.156), (2, 0.012))
_LORA_SCALES = (0.6, 0.7, 0.8, 1.0)
_ADVISED_SHARE = 0.8
_IMAGE_COUNTS = ((1, 0.578), (2, 0.083), (4, 0.191), (8, 0.148))
_STEP_COUNTS = ((30, 0.906), (40, 0.051), (20, 0.028), (50, 0.015))
_SESSION_MEAN = 3.2
"""Requests of a user."""
_PAUSE_MEDIAN_S, _PAUSE_SPREAD = 45.0, 1.1
"""Between two requests of a session: a lognormal."""
_REQUESTS_PER_HOUR = 48.0
_HOUR_S = 3600.0
_HOUR_SPREAD = 1.15
"""Of the logarithm of how busy an hour is: the busiest of a hundred has about seven times the mean."""
_DIPS = {12: 0.5, 18: 0.5}
"""Hours of the day with fewer requests."""


def generate(count: int, *, seed: int) -> list[Request]:
    """`count` requests in order of arrival; equal seeds give equal workloads."""
    rng = random.Random(seed)
    bases = _Ranked([_HOTTEST_SHARE, *_rest(BASE_COUNT - 1, _BASE_EXPONENT, 1 - _HOTTEST_SHARE)], "base")
    loras = _Ranked(_rest(LORA_COUNT, _LORA_EXPONENT, 1.0), "lora")
    arrivals: list[tuple[float, int, Request]] = []
    for order, start_s in enumerate(itertools.islice(_starts(rng), count)):
        arrivals += [(arrival_s, order, request) for arrival_s, request in _session(start_s, bases, loras, rng)]
        if len(arrivals) > 2 * count:
            break
    arrivals.sort(key=lambda arrival: arrival[:2])
    first_s = arrivals[0][0]
    return [
        Request(
            number=number,
            arrival_s=arrival_s - first_s,
            base=request.base,
            loras=request.loras,
            image_count=request.image_count,
            step_count=request.step_count,
        )
        for number, (arrival_s, _, request) in enumerate(arrivals[:count])
    ]


class _Ranked:
    """Names picked by weight."""

    def __init__(self, weights: Sequence[float], kind: str) -> None:
        self._sums, self._kind = list(itertools.accumulate(weights)), kind

    def pick(self, rng: random.Random) -> str:
        place = bisect.bisect(self._sums, rng.random() * self._sums[-1])
        return f"{self._kind}-{place:03}"


def _rest(count: int, exponent: float, total: float) -> list[float]:
    """Weights that fall with the rank, `total` together."""
    weights = [rank**-exponent for rank in range(1, count + 1)]
    return [total * weight / sum(weights) for weight in weights]


def _starts(rng: random.Random) -> itertools.chain[float]:
    """When sessions begin, hour by hour."""
    return itertools.chain.from_iterable(_hour(hour, rng) for hour in itertools.count())


def _hour(hour: int, rng: random.Random) -> list[float]:
    busy = math.exp(rng.gauss(-(_HOUR_SPREAD**2) / 2, _HOUR_SPREAD)) * _DIPS.get(hour % 24, 1.0)
    rate = busy * _REQUESTS_PER_HOUR / _SESSION_MEAN / _HOUR_S
    starts, at_s = [], rng.expovariate(rate)
    while at_s < _HOUR_S:
        starts.append(_HOUR_S * hour + at_s)
        at_s += rng.expovariate(rate)
    return starts


def _session(start_s: float, bases: _Ranked, loras: _Ranked, rng: random.Random) -> list[tuple[float, Request]]:
    used = tuple(_use(loras.pick(rng), rng) for _ in range(_pick(_LORA_COUNTS, rng)))
    # a LoRA was made for one base: which one, its name decides
    base = bases.pick(random.Random(used[0].lora_id) if used else rng)
    at_s, made = start_s, []
    while True:
        request = Request(
            number=0,
            arrival_s=0.0,
            base=base,
            loras=used,
            image_count=_pick(_IMAGE_COUNTS, rng),
            step_count=_pick(_STEP_COUNTS, rng),
        )
        made.append((at_s, request))
        if rng.random() < 1 / _SESSION_MEAN:
            return made
        at_s += _PAUSE_MEDIAN_S * math.exp(rng.gauss(0, _PAUSE_SPREAD))


def _use(lora_id: str, rng: random.Random) -> LoraUse:
    """At the scale that its author advises, mostly."""
    advised = random.Random(lora_id).choice(_LORA_SCALES)
    return LoraUse(lora_id, advised if rng.random() < _ADVISED_SHARE else rng.choice(_LORA_SCALES))


def _pick(shares: Sequence[tuple[int, float]], rng: random.Random) -> int:
    values, weights = zip(*shares, strict=True)
    (value,) = rng.choices(values, weights)
    return int(value)
