"""A network's forward as a value: what can share a batch, how calls are merged, how the answer is split.

Arguments and answers are trees (dicts, tuples, diffusers' and transformers' output classes) whose tensor leaves either
have the request's rows as first dimension or are shared by all rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

_IGNORED = ("generator",)  # AutoencoderKL.decode takes one and does not use it


@dataclass(slots=True)
class Entry:
    """A callable of a network: `forward`, or a VAE's `decode`."""

    name: str
    function: Callable[..., Any]
    parameters: tuple[str, ...]
    shared: frozenset[str]

    @classmethod
    def of(cls, network: torch.nn.Module, method: str, label: str, shared: Sequence[str]) -> Entry:
        """The entry point `method` of `network`, labelled for logs; `shared` arguments have no batch dimension."""
        function = network if method == "forward" else getattr(network, method)
        parameters = tuple(inspect.signature(getattr(network, method)).parameters)
        return cls(f"{label}.{method}", function, parameters, frozenset(shared))


class Forward:
    """A call that a program waits on.

    `rows` is the first dimension of the first tensor argument; `key` is equal for calls that may share a batch.
    """

    __slots__ = ("_spec", "args", "entry", "key", "kwargs", "leaves", "names", "rows")

    def __init__(self, entry: Entry, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Reads the call; the arguments are kept as they are."""
        self.entry, self.args, self.kwargs = entry, args, kwargs
        bound = dict(zip(entry.parameters, args, strict=False)) | kwargs
        for name in _IGNORED:
            bound.pop(name, None)
        self.names: list[str] = []
        self.leaves: list[Any] = []
        specs: list[Any] = []
        for name, value in bound.items():
            leaves, spec = tree_flatten(value)
            specs.append((name, spec))
            self.leaves.extend(leaves)
            self.names.extend([name] * len(leaves))
        self._spec = specs
        first = next((leaf for leaf in self.leaves if isinstance(leaf, torch.Tensor) and leaf.ndim), None)
        self.rows = 1 if first is None else first.shape[0]
        self.key: Hashable = (
            id(entry),
            tuple(self._leaf_key(*pair) for pair in zip(self.names, self.leaves, strict=True)),
        )

    def _leaf_key(self, name: str, leaf: Any) -> Hashable:
        if not isinstance(leaf, torch.Tensor):
            return (name, repr(leaf))
        if name == "timestep":
            return name  # schedulers disagree on its type and shape; all are merged
        if self.is_batched(name, leaf):
            return (name, tuple(leaf.shape[1:]), str(leaf.dtype))
        return (name, tuple(leaf.shape), _content(leaf))

    def is_batched(self, name: str, leaf: torch.Tensor) -> bool:
        """Whether the tensor has one row per row of the call. A timestep of no dimension stands for all rows."""
        if name == "timestep":
            return True
        return name not in self.entry.shared and leaf.ndim > 0 and leaf.shape[0] == self.rows

    def run(self) -> Any:
        """Runs the call alone, exactly as it was made."""
        return self.entry.function(*self.args, **self.kwargs)

    def rebuilt(self, leaves: list[Any]) -> dict[str, Any]:
        """The call's arguments by name, with other leaves."""
        arguments, start = {}, 0
        for name, spec in self._spec:
            arguments[name] = tree_unflatten(leaves[start : start + spec.num_leaves], spec)
            start += spec.num_leaves
        return arguments


def _content(leaf: torch.Tensor) -> Hashable:
    return leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def run_batch(calls: Sequence[Forward]) -> list[Any]:
    """Runs calls of equal key as one. Returns each call's answer, in order."""
    if len(calls) == 1:
        return [calls[0].run()]
    first = calls[0]
    merged = [_merged(calls, i) for i in range(len(first.leaves))]
    answer = first.entry.function(**first.rebuilt(merged))
    leaves, spec = tree_flatten(answer)
    rows = [call.rows for call in calls]
    total = sum(rows)
    parts = [_split(leaf, rows, total) for leaf in leaves]
    return [tree_unflatten([part[i] for part in parts], spec) for i in range(len(calls))]


def _merged(calls: Sequence[Forward], index: int) -> Any:
    leaf, name = calls[0].leaves[index], calls[0].names[index]
    if not isinstance(leaf, torch.Tensor) or not calls[0].is_batched(name, leaf):
        return leaf
    parts = [call.leaves[index] for call in calls]
    if name == "timestep":
        parts = [part.reshape(-1).expand(call.rows) for part, call in zip(parts, calls, strict=True)]
    return torch.cat(parts)


def _split(leaf: Any, rows: list[int], total: int) -> list[Any]:
    if isinstance(leaf, torch.Tensor) and leaf.ndim and leaf.shape[0] == total:
        return list(leaf.split(rows))
    return [leaf] * len(rows)
