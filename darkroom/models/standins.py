"""What stands in a pipeline where a network stood.

`Batched` hands each call to the executor; `Absent` has the network's config and no weights. Both answer every attribute
the network itself would, its class included: pipelines read config, dtype, device, and now and then a layer's width,
and ask whether a ControlNet is one or several.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Self

import greenlet
import torch
from torch.utils._pytree import tree_map_only

from darkroom.models.forwards import Entry, Forward
from darkroom.models.program import wait_for


class StandIn(torch.nn.Module):
    """Answers for a network that is kept out of the pipeline's reach, or for another stand-in of it.

    It has no parameters of its own: moving or casting it does nothing.
    """

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        # diffusers writes the module's library into the pipeline's config
        self.__dict__.update(network=network, __module__=network.__class__.__module__)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """The network's class, for `isinstance`."""
        return self.__dict__["network"].__class__ if "network" in self.__dict__ else type(self)

    def __getattr__(self, name: str) -> Any:
        """The network's own attribute."""
        if name == "network":
            raise AttributeError(name)  # only while a copy is being put together
        return getattr(self.__dict__["network"], name)


class Batched(StandIn):
    """Stands for a network that this stage holds: a call leaves the program and returns with its part of a batch."""

    def __init__(
        self,
        network: torch.nn.Module,
        label: str,
        *,
        methods: tuple[str, ...] = ("forward",),
        shared: tuple[str, ...] = (),
        row_lists: Mapping[str, int] | None = None,
        is_batched: bool = True,
    ) -> None:
        """`methods` are the entry points that pipelines call; `row_lists` as in the family's row.

        Calls of a network that `is_batched` says no to never share a batch, but still take turns with others.
        """
        super().__init__(network)
        if row_lists:
            self.__dict__["forward"] = _waiting_with_lists(RowLists(network, row_lists), label, shared)
            return
        for method in methods:
            entry = Entry.of(network, method, label, shared)
            self.__dict__[method] = _waiting(entry) if is_batched else _waiting_apart(entry)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:  # noqa: FBT001, FBT002
        """Reaches the network: `vae.to(dtype=…)` in a pipeline means the real one."""
        self.__dict__["network"]._apply(fn, recurse)  # noqa: SLF001 - what torch's own containers do
        return self


def _waiting(entry: Entry) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        return wait_for(Forward(entry, args, kwargs))

    return call


def _waiting_apart(entry: Entry) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        own = replace(entry, identity=(entry.identity, id(greenlet.getcurrent())))  # no other program's
        return wait_for(Forward(own, args, kwargs))

    return call


class RowLists(torch.nn.Module):
    """A network that takes and returns lists with a tensor for each row, behind a face with a batch dimension.

    A list arrives as one tensor [B, longest, ...] padded with zeros, and beside it, as `<name>_lengths` [B], how much
    of each row counts.
    """

    def __init__(self, network: torch.nn.Module, multiples: Mapping[str, int]) -> None:
        """`multiples`: to a multiple of what the first dimension of each argument's tensors is padded."""
        super().__init__()
        self.network, self.multiples = network, multiples

    def pack(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments by name, their lists as padded tensors with lengths."""
        packed: dict[str, Any] = {}
        for name, value in arguments.items():
            if name not in self.multiples:
                packed[name] = value
                continue
            multiple = self.multiples[name]
            lengths = [len(row) for row in value]
            longest = -(-max(lengths) // multiple) * multiple
            packed[name] = torch.stack(
                [torch.cat([row, row.new_zeros(longest - len(row), *row.shape[1:])]) for row in value]
            )
            packed[f"{name}_lengths"] = torch.tensor(lengths)
        return packed

    def forward(self, **packed: Any) -> tuple[torch.Tensor]:
        """Runs the network on lists. Its answer's rows, of equal shape, come back as one tensor."""
        arguments = {name: value for name, value in packed.items() if not name.endswith("_lengths")}
        for name in self.multiples:
            lengths = packed[f"{name}_lengths"].tolist()
            arguments[name] = [row[:length] for row, length in zip(packed[name], lengths, strict=True)]
        return (torch.stack(list(self.network(**arguments)[0])),)


def _waiting_with_lists(lists: RowLists, label: str, shared: tuple[str, ...]) -> Any:
    names = Entry.of(lists.network, "forward", label, shared).parameters
    entry = Entry.of(lists, "forward", label, shared)

    def call(*args: Any, **kwargs: Any) -> Any:
        (rows,) = wait_for(Forward(entry, (), lists.pack(dict(zip(names, args, strict=False)) | kwargs)))
        return (list(rows),)

    return call


class Absent(StandIn):
    """Stands for a network that another stage holds: built from its config on the meta device.

    Says that it is on the stage's device, or the meta device leaks into schedulers and noise. Called, it answers zeros
    of its first argument's shape: the decode stage runs one such step and throws the answer away, so that neither the
    channels of a learned variance nor a missing minus sign matter, only that pipelines can slice and add it.
    """

    def __init__(self, network: torch.nn.Module, *, device: torch.device, dtype: torch.dtype) -> None:
        """`network` lives on the meta device."""
        super().__init__(network)
        self.__dict__.update(device=device, dtype=dtype)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any]:
        """Zeros in the shape of the first argument: a tensor, or a list of them."""
        return (tree_map_only(torch.Tensor, torch.zeros_like, next(iter([*args, *kwargs.values()]))),)
