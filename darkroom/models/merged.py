"""A network's copy in which the layers that LoRAs change have weights of their own; all others are the network's.

The rule: the arithmetic is PEFT's, in its order of operations, so that the copy answers as diffusers' network after
`fuse_lora`. What PEFT cannot merge, convolutions in groups, is not merged here either.
"""

import itertools
import time
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from darkroom.models.adapted import CONVOLUTIONS, Addition, Scaled, additions_of, callable_of, tree_copied
from darkroom.models.forwards import Adapter, Entry
from darkroom.models.lora import Delta

_PAUSE_S = 0.0001
_numbers = itertools.count()


@dataclass(frozen=True, slots=True, eq=False)
class Merged:
    """One network with LoRAs in its weights. Calls that carry it run on it, and share batches with each other alone."""

    tree: torch.nn.Module
    number: int = field(default_factory=lambda: next(_numbers))

    @property
    def company(self) -> Hashable:
        """No other's. It names the copy and does not hold it: keys are remembered longer than copies live."""
        return ("merged", self.number)

    @property
    def is_beside(self) -> bool:
        """It is not: nothing is added to what the weights answer."""
        return False

    def run(
        self, entry: Entry, rows: Sequence[tuple[Adapter | None, int]], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        """Calls the copy by `entry`; all rows are its own."""
        del rows
        return callable_of(self.tree, entry)(*args, **kwargs)


def merged_bytes(networks: Mapping[str, torch.nn.Module], loras: Sequence[Scaled]) -> int | None:
    """Bytes that the copies' own weights take; None where a layer cannot be merged."""
    total_bytes = 0
    for name, module in _changed(loras):
        layer: Any = networks[name].get_submodule(module)
        if getattr(layer, "groups", 1) != 1:
            return None
        has_bias = any(delta.up_bias is not None for delta, _, _ in additions_of(loras, name, module))
        count = layer.weight.numel() + has_bias * len(layer.weight)
        total_bytes += count * layer.weight.element_size()
    return total_bytes


def merge(networks: Mapping[str, torch.nn.Module], loras: Sequence[Scaled]) -> dict[str, Merged]:
    """Copies of the networks that the LoRAs change. Layer by layer with pauses, for the sake of the engine's thread."""
    trees: dict[str, torch.nn.Module] = {}
    for name, module in _changed(loras):
        if name not in trees:
            trees[name] = tree_copied(networks[name])
        _merge_layer(trees[name].get_submodule(module), additions_of(loras, name, module))
        time.sleep(_PAUSE_S)
    return {name: Merged(tree) for name, tree in trees.items()}


def _changed(loras: Sequence[Scaled]) -> list[tuple[str, str]]:
    """Networks and their modules, by name, each once."""
    found = [(name, module) for each in loras for name, deltas in each.lora.networks.items() for module in deltas]
    return list(dict.fromkeys(found))


@torch.no_grad()
def _merge_layer(layer: Any, additions: Sequence[Addition]) -> None:
    """Gives a layer weights of its own.

    A magnitude's factor is the length of the base's own weights with the product: it counts for all that came before.
    """
    weight, added_bias = layer.weight.detach().clone(), None
    for delta, scaling, factor in additions:
        weight += _product(layer, delta, scaling)
        if delta.up_bias is not None:
            bias = delta.up_bias * scaling
            added_bias = bias if added_bias is None else added_bias + bias
        if factor is not None:
            weight *= factor.view(-1, *[1] * (weight.ndim - 1))
            added_bias = None if added_bias is None else added_bias * factor.view(-1)
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    if added_bias is not None:
        whole = added_bias if layer.bias is None else layer.bias + added_bias
        layer.bias = torch.nn.Parameter(whole, requires_grad=False)


def _product(layer: Any, delta: Delta, scaling: float) -> torch.Tensor:
    """What a LoRA adds to a layer's weights. In half precision a CPU multiplies in single, as in PEFT."""
    down, up, dtype = delta.down, delta.up, delta.down.dtype
    if down.device.type == "cpu" and dtype in {torch.float16, torch.bfloat16}:
        down, up = down.float(), up.float()
    if isinstance(layer, torch.nn.Linear):
        product = up @ down
    elif layer.weight.ndim == 4 and layer.kernel_size == (1, 1):  # noqa: PLR2004 - of an image
        product = (up.flatten(1) @ down.flatten(1))[..., None, None]
    else:
        product = CONVOLUTIONS[type(layer)](down.transpose(0, 1), up).transpose(0, 1)
    return (product * scaling).to(dtype)
