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
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from darkroom.models.forwards import Adapter, Entry, Unmixable
from darkroom.models.lora import Delta, Lora
from darkroom.models.standins import RowLists

_CONVOLUTIONS: Mapping[type[torch.nn.Module], Callable[..., torch.Tensor]] = {
    torch.nn.Conv1d: F.conv1d,
    torch.nn.Conv2d: F.conv2d,
    torch.nn.Conv3d: F.conv3d,
}
_PAUSE_S = 0.0001
_Scaled = tuple[tuple[Mapping[str, Delta], float], ...]


@dataclass(frozen=True, slots=True)
class Mix:
    """LoRAs with their scales, in the order in which they are added, as a call to one network carries them."""

    network: AdaptedNetwork
    label: str
    loras: tuple[tuple[Lora, float], ...]

    @property
    def company(self) -> Hashable:
        """None while calls with different LoRAs, and with none, can share a batch."""
        return None if self.network.is_mixable else self.loras

    def scaled(self) -> _Scaled:
        """The deltas of the network that the call is to, with the request's scales."""
        return tuple((lora.networks[self.label], scale) for lora, scale in self.loras if self.label in lora.networks)

    def run(
        self, entry: Entry, rows: Sequence[tuple[Adapter | None, int]], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        """Calls the adapted network. Raises Unmixable."""
        spans, start = [], 0
        for mix, count in rows:
            assert mix is None or isinstance(mix, Mix)
            spans.append(_Span(start, start + count, mix.scaled() if mix else ()))
            start += count
        return self.network.run(entry, spans, args, kwargs)


@dataclass(frozen=True, slots=True)
class _Span:
    """Rows of a batch, from `start` to before `stop`, and what is added to them."""

    start: int
    stop: int
    loras: _Scaled


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

    def run(self, entry: Entry, spans: Sequence[_Span], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Calls the copy by `entry`, each span of rows with its own additions. Raises Unmixable."""
        with self._running:
            self.spans = tuple(spans)
            try:
                return self._called(entry)(*args, **kwargs)
            except Unmixable:
                self.is_mixable = False
                raise
            finally:
                self.spans = ()

    def _called(self, entry: Entry) -> Any:
        """What `entry` calls of the network, of the copy."""
        assert self._tree is not None
        if isinstance(entry.function, RowLists):
            return RowLists(self._tree, entry.function.multiples)
        return self._tree if entry.method == "forward" else getattr(self._tree, entry.method)


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

    __slots__ = ("_down", "_forward", "_name", "_network", "_up")

    def __init__(self, network: AdaptedNetwork, name: str, layer: torch.nn.Module) -> None:
        """`layer` is the copy's linear or convolutional layer of that name."""
        self._network, self._name, self._forward = network, name, layer.forward
        self._down: Callable[..., torch.Tensor] = F.linear
        self._up: Callable[..., torch.Tensor] = F.linear
        if not isinstance(layer, torch.nn.Linear):
            convolution, own = _CONVOLUTIONS[type(layer)], vars(layer)
            self._down = functools.partial(convolution, stride=own["stride"], padding=own["padding"])
            self._up = functools.partial(convolution, groups=own["groups"])

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The layer's own answer, and each row's additions."""
        result: torch.Tensor = self._forward(x, *args, **kwargs)
        spans = self._network.spans
        if len(spans) == 1:
            for delta, scaling in self._found(spans[0]):
                result = result + (self._product(x, delta) * scaling).to(result.dtype)
            return result
        found = [(span, self._found(span)) for span in spans]
        if any(deltas for _, deltas in found) and not len(x) == len(result) == spans[-1].stop:
            raise Unmixable(self._name)
        for span, deltas in found:
            for delta, scaling in deltas:
                result[span.start : span.stop] += self._product(x[span.start : span.stop], delta) * scaling
        return result

    def _found(self, span: _Span) -> list[tuple[Delta, float]]:
        return [
            (delta, delta.scaling(scale))
            for deltas, scale in span.loras
            if (delta := deltas.get(self._name)) is not None
        ]

    def _product(self, x: torch.Tensor, delta: Delta) -> torch.Tensor:
        return self._up(self._down(x.to(delta.down.dtype), delta.down), delta.up, delta.up_bias)
