"""Networks as they are before they have weights, made once for each config and copied from then on.

Models of one config differ in weights alone, and stores are full of those. Making a network's modules by their
constructors is the better part of loading a small one, in Python, which the engine's thread wants too; a copy takes a
tenth of it.
"""

import copyreg
import io
import pickle
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import structlog
import torch

_log = structlog.get_logger()
_MAX_BYTES = 32 << 20
"""Of the blueprints kept. One takes some hundred kilobytes, unless its network computes large tables for itself."""
_NONE = b""
"""Kept for networks that cannot be copied."""


class Blueprints:
    """Those of one process. Its methods may be called from any thread."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Hashable, bytes] = OrderedDict()
        """Pickled networks, those used last at the end."""
        self._lock = threading.Lock()

    def network(self, key: Hashable, make: Callable[[], torch.nn.Module]) -> torch.nn.Module:
        """A network of the caller's own, as `make` makes it.

        Its parameters and persistent buffers hold no values, other tensors do. `key` is equal only where `make` would
        make the same. The first of a key is what `make` returned, and so is every one that cannot be copied.
        """
        with self._lock:
            pickled = self._kept.get(key)
            if pickled is not None:
                self._kept.move_to_end(key)
        if pickled:
            return _copied(pickled)
        network = make()
        if pickled is None:
            self._keep(key, network)
        return network

    def _keep(self, key: Hashable, network: torch.nn.Module) -> None:
        try:
            pickled = _pickled(network)
            _copied(pickled)
        except Exception as error:  # noqa: BLE001 - modules that hold what is of this process alone raise all sorts
            _log.info("made_every_time", network=type(network).__name__, reason=str(error)[:100])
            pickled = _NONE
        with self._lock:
            self._kept[key] = pickled
            while sum(map(len, self._kept.values())) > _MAX_BYTES:
                self._kept.popitem(last=False)


def _copied(pickled: bytes) -> torch.nn.Module:
    network: torch.nn.Module = pickle.loads(pickled)  # noqa: S301 - pickled by this process, kept in its memory
    return network


def _pickled(network: torch.nn.Module) -> bytes:
    """The network without the values that weights files hold."""
    stored = {id(tensor) for tensor in network.state_dict(keep_vars=True).values()}

    def reduced(tensor: torch.Tensor) -> Any:
        if id(tensor) in stored or tensor.is_meta:
            return _without_values, (isinstance(tensor, torch.nn.Parameter), tuple(tensor.shape), tensor.dtype)
        return tensor.__reduce_ex__(pickle.HIGHEST_PROTOCOL)

    file = io.BytesIO()
    pickler = pickle.Pickler(file, protocol=pickle.HIGHEST_PROTOCOL)
    pickler.dispatch_table = {**copyreg.dispatch_table, torch.Tensor: reduced, torch.nn.Parameter: reduced}
    pickler.dump(network)
    return file.getvalue()


def _without_values(is_parameter: bool, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:  # noqa: FBT001
    tensor = torch.empty(shape, dtype=dtype, device="meta")
    return torch.nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor
