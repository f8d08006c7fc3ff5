"""DoRA (arXiv:2402.09353): a LoRA that also says how long each output channel's weights are.

The rule: the arithmetic is PEFT's, in its order of operations, so that images are the same. What depends on the weights
and a request's scale, but on no input, is worked out once, beside the engine.
"""

import time
from collections.abc import Mapping

import torch
from torch.nn import functional as F

from darkroom.models.lora import Delta, Lora

_PAUSE_S = 0.0001
Factors = Mapping[str, Mapping[str, torch.Tensor]]
"""By the network's name, then the module's: what its result is multiplied by. Only modules that have a magnitude."""


def factors_of(lora: Lora, networks: Mapping[str, torch.nn.Module], scale: float) -> Factors:
    """The factors of a LoRA at one scale; module by module with pauses, for the sake of the engine's thread."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, deltas in lora.networks.items():
        for module, delta in deltas.items():
            if delta.magnitude is not None:
                weight = networks[name].get_parameter(f"{module}.weight")
                found.setdefault(name, {})[module] = _factor(delta, delta.magnitude, weight, delta.scaling(scale))
                time.sleep(_PAUSE_S)
    return found


@torch.no_grad()
def _factor(delta: Delta, magnitude: torch.Tensor, weight: torch.Tensor, scaling: float) -> torch.Tensor:
    """Magnitude by length of each output channel's weights with the product: [1, out] or [1, out, *1]."""
    length: torch.Tensor
    if magnitude.ndim == 1:  # a linear layer's
        product = F.linear(delta.down.T.contiguous(), delta.up).T
        length = torch.linalg.norm(weight + scaling * product, dim=1)
        return (magnitude / length).view(1, -1)
    rank = len(delta.down)
    product = torch.mm(delta.up.view(-1, rank), delta.down.view(rank, -1)).reshape(weight.shape)
    length = (weight + scaling * product).norm(p=2, dim=tuple(range(1, weight.ndim)), keepdim=True)
    return magnitude / length.transpose(1, 0)


def addition(
    result: torch.Tensor, product: torch.Tensor, bias: torch.Tensor | None, factor: torch.Tensor, scaling: float
) -> torch.Tensor:
    """What is added to a layer's result so far, so that all of it but the bias is multiplied by the factor."""
    unbiased = result if bias is None else result - bias.view(factor.shape)
    return (factor - 1) * unbiased + factor * product * scaling
