"""The requests of bench.stepbatch, when they arrive, and the least time that they can take. Pure: no clock, no I/O."""

import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.bound import cheapest, replica_s

MODELS = ("shapes-1", "shapes-2")
LORAS_PER_MODEL = 3
SIDES_PX = (64, 96)
SCHEDULERS = ("ddim", "euler_a", "dpmpp_2m")
"""One forward per step each, so that steps are forwards."""
PROMPT_COUNT = 16
FEWEST_STEPS, MOST_STEPS = 4, 50
_LORA_SHARE = 0.3
_LORA_SCALES = (0.5, 0.8, 1.0)

Curve = Mapping[int, float]
"""Seconds of a forward by its rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """One request of a stream. All are guided: two rows of the UNet each."""

    number: int
    model_id: str
    side_px: int
    step_count: int
    scheduler: str
    guidance_scale: float
    seed: int
    prompt: int
    """Which of the store's embeddings."""
    lora_id: str
    """Empty without a LoRA."""
    lora_scale: float
    gap: float
    """Time since the request before it came, in mean gaps."""


def lora_ids(model_id: str) -> list[str]:
    """The LoRAs that the store has for a model."""
    return [f"{model_id}-lora-{number}" for number in range(LORAS_PER_MODEL)]


def stream(count: int, seed: int, most_steps: int = MOST_STEPS) -> list[Wanted]:
    """A Poisson stream of `count` requests in order of arrival, each property drawn evenly.

    Every model, size and scheduler comes equally often, step counts lie evenly over their range, and three in ten have
    a LoRA, as near as `count` allows: streams of different seeds differ in order and company, hardly in work. The last
    one comes after `count` mean gaps: so many arrivals in so long, each at any time, is what makes a stream Poisson.
    """
    rng = random.Random(seed)
    gaps = [rng.expovariate(1.0) for _ in range(count)]
    kinds = list(itertools.islice(itertools.cycle(itertools.product(MODELS, SIDES_PX, SCHEDULERS)), count))
    span = most_steps - FEWEST_STEPS + 1
    steps = [FEWEST_STEPS + int(span * (place + rng.random()) / count) for place in range(count)]
    with_lora = [place < round(_LORA_SHARE * count) for place in range(count)]
    for values in (kinds, steps, with_lora):
        rng.shuffle(values)
    return [
        Wanted(
            number=number,
            model_id=model_id,
            side_px=side_px,
            step_count=steps[number],
            scheduler=scheduler,
            guidance_scale=round(rng.uniform(1.5, 8.0), 1),
            seed=1000 * seed + number,
            prompt=rng.randrange(PROMPT_COUNT),
            lora_id=rng.choice(lora_ids(model_id)) if with_lora[number] else "",
            lora_scale=rng.choice(_LORA_SCALES),
            gap=gaps[number] * count / sum(gaps),
        )
        for number, (model_id, side_px, scheduler) in enumerate(kinds)
    ]


def arrivals_s(requests: Sequence[Wanted], rate: float) -> list[float]:
    """When each request arrives, `rate` of them a second in the mean; all at once at an infinite rate."""
    return list(itertools.accumulate(request.gap / rate for request in requests))


def least_s(requests: Sequence[Wanted], curves: Mapping[int, Curve]) -> float:
    """Least seconds of UNet forwards for requests that are all there from the start. `curves`: by image side.

    Requests of one model and size can share batches. Each has its steps one after another, so at step t only those of
    more than t steps are left to share: the bound runs exactly these together, in whatever batches are cheapest on the
    curve, kind by kind. Nothing else is counted: no LoRA, no scheduler, no Python.
    """
    total_s = 0.0
    for model_id, side_px in itertools.product(MODELS, SIDES_PX):
        steps = [r.step_count for r in requests if (r.model_id, r.side_px) == (model_id, side_px)]
        total_s += replica_s(steps, cheapest(curves[side_px], len(steps)))
    return total_s


def curve_s(curve: Curve, rows: int) -> float:
    """The curve between the sizes measured, and beyond the largest in proportion."""
    sizes = sorted(curve)
    if rows >= sizes[-1]:
        return curve[sizes[-1]] * rows / sizes[-1]
    above = next(size for size in sizes if size >= rows)
    below = max((size for size in sizes if size <= rows), default=above)
    share = (rows - below) / (above - below) if above > below else 0.0
    return curve[below] * (1 - share) + curve[above] * share
