"""The requests that benches send: the same ones to the services and to plain diffusers."""

import random
from dataclasses import dataclass

from darkroom.client import Drawing
from training.scenes import caption, random_scene

MIX_SCHEDULERS = ("ddim", "euler", "dpmpp_2m")
"""One forward per step each, so that steps are rows of work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One picture to draw, with nothing left to a default but the size."""

    prompt: str
    step_count: int
    guidance_scale: float
    seed: int
    scheduler: str = ""
    """As the router names it; empty means the model's own."""

    def drawing(self, model_id: str) -> Drawing:
        """The task as the client takes it."""
        return Drawing(
            prompt=self.prompt,
            model_id=model_id,
            step_count=self.step_count,
            guidance_scale=self.guidance_scale,
            seed=self.seed,
            scheduler=self.scheduler,
        )


def distinct_prompts(count: int, seed: int) -> list[str]:
    """Captions of random scenes, each with a number of its own: no two share an embedding."""
    rng = random.Random(seed)
    return [f"{caption(random_scene(rng))} {seed} {number}" for number in range(count)]


def mixed_tasks(count: int, round_number: int) -> list[Task]:
    """Tasks of 10 to 30 steps over three schedulers, each with its own guidance scale, prompt and seed.

    Steps, schedulers and scales are the same in every round, so that rounds compare; prompts and seeds are not.
    """
    rng = random.Random(0)
    return [
        Task(
            prompt=prompt,
            step_count=rng.randint(10, 30),
            guidance_scale=round(rng.uniform(1.5, 8.0), 1),
            seed=1000 * round_number + number,
            scheduler=MIX_SCHEDULERS[number % len(MIX_SCHEDULERS)],
        )
        for number, prompt in enumerate(distinct_prompts(count, seed=round_number))
    ]
