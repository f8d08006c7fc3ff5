"""What stands in a pipeline where a network stood.

`Batched` hands each call to the executor; `Absent` has the network's config and no weights. Both answer every attribute
the network itself would: pipelines read config, dtype, device, and now and then a layer's width.
"""

from typing import Any

import torch

from darkroom.models.executor import wait_for
from darkroom.models.forwards import Entry, Forward


class Batched(torch.nn.Module):
    """Stands for a network that this stage holds: a call leaves the program and returns with its part of a batch."""

    def __init__(
        self,
        network: torch.nn.Module,
        label: str,
        *,
        methods: tuple[str, ...] = ("forward",),
        shared: tuple[str, ...] = (),
    ) -> None:
        """`methods` are the entry points that pipelines call."""
        super().__init__()
        self.__dict__["network"] = network
        for method in methods:
            self.__dict__[method] = _waiting(Entry.of(network, method, label, shared))

    def __getattr__(self, name: str) -> Any:
        """The network's own attribute."""
        return getattr(self.__dict__["network"], name)


def _waiting(entry: Entry) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        return wait_for(Forward(entry, args, kwargs))

    return call


class Absent(torch.nn.Module):
    """Stands for a network that another stage holds: built from its config on the meta device.

    Says that it is on the stage's device, or the meta device leaks into schedulers and noise. Called, it answers zeros
    of its first argument's shape: the decode stage runs one such step and throws the answer away.
    """

    def __init__(self, network: torch.nn.Module, *, device: torch.device, dtype: torch.dtype) -> None:
        """`network` lives on the meta device."""
        super().__init__()
        self.__dict__.update(network=network, device=device, dtype=dtype)

    def __getattr__(self, name: str) -> Any:
        """The network's own attribute."""
        return getattr(self.__dict__["network"], name)

    def forward(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> tuple[torch.Tensor]:
        """Zeros in the shape of the first tensor given."""
        return (torch.zeros_like(next(iter([*args, *kwargs.values()]))),)
