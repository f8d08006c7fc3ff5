"""Networks as they are before they have weights, made once for each config and copied from then on.

Models of one config differ in weights alone, and stores are full of those. Making a network's modules by their
constructors is the better part of loading a small one, in Python, which the engine's thread wants too; a copy takes a
tenth of it (docs/benchmarks.md).
"""

import copyreg
import io
import pickle
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch

_MOST = 64
"""Blueprints kept. One takes some hundred kilobytes."""
_NOT_WRITTEN = (pickle.PicklingError, AttributeError, TypeError, NotImplementedError, RecursionError)
"""What modules raise that hold something of this process alone, a lambda say."""


class Blueprints:
    """Those of one process. Its methods may be called from any thread."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Hashable, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def network(self, key: Hashable, make: Callable[[], torch.nn.Module]) -> torch.nn.Module:
        """A network of the caller's own, as `make` makes it.

        Its parameters and persistent buffers hold no values, other tensors do. `key` is equal only where `make` would
        make the same. The first of a key is what `make` returned, and so is every one that cannot be copied.
        """
        with self._lock:
            written = self._kept.get(key)
            if written is not None:
                self._kept.move_to_end(key)
        if written is not None:
            copied: torch.nn.Module = pickle.loads(written)  # noqa: S301 - written by this process, kept in its memory
            return copied
        network = make()
        try:
            written = _written(network)
        except _NOT_WRITTEN:
            return network
        with self._lock:
            self._kept[key] = written
            while len(self._kept) > _MOST:
                self._kept.popitem(last=False)
        return network


def _written(network: torch.nn.Module) -> bytes:
    """The network as text, without the values that weights files hold."""
    filled = {id(tensor) for tensor in network.state_dict(keep_vars=True).values()}

    def reduced(tensor: torch.Tensor) -> Any:
        if id(tensor) in filled or tensor.is_meta:
            return _unfilled, (isinstance(tensor, torch.nn.Parameter), tuple(tensor.shape), tensor.dtype)
        return tensor.__reduce_ex__(pickle.HIGHEST_PROTOCOL)

    text = io.BytesIO()
    pickler = pickle.Pickler(text, protocol=pickle.HIGHEST_PROTOCOL)
    pickler.dispatch_table = {**copyreg.dispatch_table, torch.Tensor: reduced, torch.nn.Parameter: reduced}
    pickler.dump(network)
    return text.getvalue()


def _unfilled(is_parameter: bool, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:  # noqa: FBT001 - pickle's
    tensor = torch.empty(shape, dtype=dtype, device="meta")
    return torch.nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor
