"""What a request has of its own while it shares a part's networks: the pipeline object and the scheduler."""

import copy
from typing import Any

import diffusers
from diffusers import DiffusionPipeline

from darkroom.models.loader import Part
from darkroom.schedulers import scheduler_choice


def own_copy(part: Part) -> DiffusionPipeline:
    """A pipeline object of the request's own over the same networks: pipelines keep state of a call on themselves."""
    return copy.copy(part.pipeline)


def fresh_scheduler(own: Any, name: str) -> Any:
    """A fresh scheduler over the model's own noise schedule."""
    if not name:
        return type(own).from_config(own.config)
    choice = scheduler_choice(name)
    return getattr(diffusers, choice.class_name).from_config(own.config, **dict(choice.options))
