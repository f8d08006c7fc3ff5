"""What a request has of its own while it shares a part's networks: the pipeline object and the scheduler."""

import copy
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any
from weakref import WeakKeyDictionary

import diffusers
import torch
from diffusers import DiffusionPipeline

from darkroom.models.loader import Part
from darkroom.schedulers import scheduler_choice

_NONE: Mapping[str, torch.nn.Module] = MappingProxyType({})


def own_copy(
    part: Part, stand_ins: Mapping[str, torch.nn.Module] = _NONE, shared: DiffusionPipeline | None = None
) -> DiffusionPipeline:
    """A pipeline object of the request's own over the same networks: pipelines keep state of a call on themselves.

    `stand_ins`: what to put in place of the part's own, by component; `shared`: a variant of the part's pipeline.
    """
    pipeline = copy.copy(part.pipeline if shared is None else shared)
    for name, stand_in in stand_ins.items():
        object.__setattr__(pipeline, name, stand_in)  # not by the pipeline's own way, which writes into its config
    return pipeline


_MADE: WeakKeyDictionary[Any, dict[str, Any]] = WeakKeyDictionary()


def fresh_scheduler(own: Any, name: str) -> Any:
    """A fresh scheduler over the model's own noise schedule.

    Made once for each name and then copied: making one computes the whole schedule, which takes as long as a step.
    """
    made = _MADE.setdefault(own, {})
    if name not in made:
        made[name] = _new_scheduler(own, name)
    return copy.deepcopy(made[name])


def _new_scheduler(own: Any, name: str) -> Any:
    if not name:
        return type(own).from_config(own.config)
    choice = scheduler_choice(name)
    return getattr(diffusers, choice.class_name).from_config(own.config, **dict(choice.options))
