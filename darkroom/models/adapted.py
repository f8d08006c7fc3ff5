"""A network with low-rank products added to some of its layers, other ones for each row of a batch.

The network itself is never touched: it runs the batches in which nobody has a LoRA. Beside it stands a copy of its tree
of modules over the same parameters, whose layers add what the batch's rows ask for. The copy is made once; a LoRA that
comes later only changes which layers look for additions, one assignment each, so that the engine never waits for it.
"""

from __future__ import annotations

import copy
import functools
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional as F

from darkroom.models.dora import Factors, addition
from darkroom.models.forwards import Adapter, Entry, Unmixable
from darkroom.models.lora import Delta, Lora
from darkroom.models.standins import RowLists

CONVOLUTIONS: Mapping[type[torch.nn.Module], Callable[..., torch.Tensor]] = {
    torch.nn.Conv1d: F.conv1d,
    torch.nn.Conv2d: F.conv2d,
    torch.nn.Conv3d: F.conv3d,
}
_PAUSE_S = 0.0001
Addition = tuple[Delta, float, torch.Tensor | None]
"""A product, its scaling, and the layer's factor if the LoRA has magnitudes."""


@dataclass(frozen=True, slots=True)
class Scaled:
    """A LoRA at the scale of a request."""

    lora: Lora
    scale: float
    factors: Factors = field(default_factory=dict, compare=False)
    """Those of this scale; they follow from the other two."""


@dataclass(frozen=True, slots=True)
class Mix:
    """LoRAs with their scales, in the order in which they are added, as a call to one network carries them."""

    network: AdaptedNetwork
    label: str
    loras: tuple[Scaled, ...]

    @property
    def company(self) -> Hashable:
        """None while calls with different LoRAs, and with none, can share a batch."""
        return None if self.network.is_mixable else self.loras

    @property
    def is_beside(self) -> bool:
        """It is: each layer's product is worked out for each batch."""
        return True

    def run(
        self, entry: Entry, rows: Sequence[tuple[Adapter | None, int]], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        """Calls the adapted network. Raises Unmixable."""
        spans, start = [], 0
        for mix, count in rows:
            assert mix is None or isinstance(mix, Mix)
            spans.append(_Span(start, start + count, mix.label, mix.loras) if mix else _Span(start, start + count))
            start += count
        return self.network.run(entry, spans, args, kwargs)


@dataclass(frozen=True, slots=True)
class _Span:
    """Rows of a batch, from `start` to before `stop`, and what is added to them."""

    start: int
    stop: int
    label: str = ""
    """The network's name in the LoRAs."""
    loras: tuple[Scaled, ...] = ()

    def additions(self, module: str) -> list[Addition]:
        """What the LoRAs add to one layer, in their order."""
        return additions_of(self.loras, self.label, module)


class AdaptedNetwork:
    """One network's adapted copy, made when it is first needed. Any thread may add layers; one at a time may run."""

    def __init__(self, network: torch.nn.Module) -> None:
        """`network` is what is copied."""
        self.network = network
        self.is_mixable = True
        self.spans: tuple[_Span, ...] = ()
        """Of the batch that runs now; a single one covers whatever rows there are."""
        self._tree: torch.nn.Module | None = None
        self._making, self._running = threading.Lock(), threading.Lock()

    def adapt(self, modules: Iterable[str]) -> None:
        """Makes these layers look for additions from now on."""
        with self._making:
            tree = self._tree or tree_copied(self.network)
            for name in modules:
                layer = tree.get_submodule(name)
                if not isinstance(layer.__dict__.get("forward"), AdaptedLayer):
                    layer.forward = AdaptedLayer(self, name, layer)
            self._tree = tree

    def close(self) -> None:
        """Unmakes the copy: its layers and what looks for their additions hold each other."""
        with self._making:
            for layer in self._tree.modules() if self._tree else ():
                layer.__dict__.pop("forward", None)
            self._tree = None

    def run(self, entry: Entry, spans: Sequence[_Span], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Calls the copy by `entry`, each span of rows with its own additions. Raises Unmixable."""
        with self._running:
            self.spans = tuple(spans)
            try:
                assert self._tree is not None
                return callable_of(self._tree, entry)(*args, **kwargs)
            except Unmixable:
                self.is_mixable = False
                raise
            finally:
                self.spans = ()


def additions_of(loras: Iterable[Scaled], label: str, module: str) -> list[Addition]:
    """What LoRAs add to one layer of the network with that name in them, in their order."""
    return [
        (delta, delta.scaling(scaled.scale), scaled.factors.get(label, {}).get(module))
        for scaled in loras
        if (delta := scaled.lora.networks.get(label, {}).get(module)) is not None
    ]


def callable_of(tree: torch.nn.Module, entry: Entry) -> Callable[..., Any]:
    """What `entry` calls of a network, of its copy."""
    if isinstance(entry.function, RowLists):
        return RowLists(tree, entry.function.multiples)
    called: Callable[..., Any] = tree if entry.method == "forward" else getattr(tree, entry.method)
    return called


def tree_copied(network: torch.nn.Module) -> torch.nn.Module:
    """A copy of the modules over the same parameters and buffers.

    Module by module with pauses: in one go, a big network's copy would keep the interpreter from the engine's thread
    for a good part of a second.
    """
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    for module in reversed(list(network.modules())):
        copy.deepcopy(module, memo)
        time.sleep(_PAUSE_S)
    return copy.deepcopy(network, memo)


class AdaptedLayer:
    """Stands for the `forward` of a layer in the copy."""

    __slots__ = ("_down", "_forward", "_layer", "_name", "_network", "_up")

    def __init__(self, network: AdaptedNetwork, name: str, layer: torch.nn.Module) -> None:
        """`layer` is the copy's linear or convolutional layer of that name."""
        self._network, self._name, self._forward = network, name, layer.forward
        self._layer: Any = layer
        self._down: Callable[..., torch.Tensor] = F.linear
        self._up: Callable[..., torch.Tensor] = F.linear
        if not isinstance(layer, torch.nn.Linear):
            convolution, own = CONVOLUTIONS[type(layer)], vars(layer)
            self._down = functools.partial(convolution, stride=own["stride"], padding=own["padding"])
            self._up = functools.partial(convolution, groups=own["groups"])

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The layer's own answer, and each row's additions."""
        result: torch.Tensor = self._forward(x, *args, **kwargs)
        spans = self._network.spans
        if len(spans) == 1:
            for each in spans[0].additions(self._name):
                result = result + self._added(x, result, each).to(result.dtype)
            return result
        found = [(span, span.additions(self._name)) for span in spans]
        if any(additions for _, additions in found) and not len(x) == len(result) == spans[-1].stop:
            raise Unmixable(self._name)
        for span, additions in found:
            if additions:
                size = span.stop - span.start
                self._add_to_rows(x.narrow(0, span.start, size), result.narrow(0, span.start, size), additions)
        return result

    def _add_to_rows(self, x: torch.Tensor, result: torch.Tensor, additions: list[Addition]) -> None:
        """Adds in place; a plain product of a linear layer in one operation, which rounds less often than two."""
        for each in additions:
            delta, scaling, factor = each
            is_plain = factor is None and delta.up_bias is None and self._up is F.linear
            if is_plain and result.is_contiguous() and result.dtype is x.dtype is delta.up.dtype:
                low = F.linear(x, delta.down).flatten(0, -2)
                result.view(-1, result.shape[-1]).addmm_(low, delta.up.t(), alpha=scaling)
            else:
                result.add_(self._added(x, result, each))

    def _added(self, x: torch.Tensor, result: torch.Tensor, each: Addition) -> torch.Tensor:
        """What one LoRA adds to the layer's result so far."""
        delta, scaling, factor = each
        product = self._up(self._down(x.to(delta.down.dtype), delta.down), delta.up, delta.up_bias)
        if factor is None:
            assert delta.magnitude is None
            return product if scaling == 1.0 else product * scaling
        return addition(result, product, self._layer.bias, factor, scaling)
