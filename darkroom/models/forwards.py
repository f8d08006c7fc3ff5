"""A network's forward as a value: what can share a batch, how calls are merged, how the answer is split.

Arguments and answers are trees (dicts, tuples, diffusers' and transformers' output classes) whose tensor leaves either
have the request's rows as first dimension or are shared by all rows. It runs on the engine's thread at every step, so
that what can be known once is not looked up twice.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import inspect
import itertools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

_IGNORED = ("generator",)  # AutoencoderKL.decode takes one and does not use it
_TIMESTEP = "timestep"  # schedulers disagree on its type and shape; all are merged
_PLAIN = frozenset({type(None), bool, int, float, str, torch.dtype})
_CONTENT = "_darkroom_content"


class Unmixable(Exception):
    """Raised by an adapted network that cannot tell its rows apart: calls with different adapters must run apart."""


class Adapter(Protocol):
    """What a call adds to its network's own weights. Equal adapters add the same."""

    @property
    def company(self) -> Hashable:
        """Part of the key: None if the call can share a batch with any other adapter, and with none."""

    @property
    def is_beside(self) -> bool:
        """Whether it costs work beside the network's; else the network has it in its weights."""

    def run(
        self, entry: Entry, rows: Sequence[tuple[Adapter | None, int]], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        """Calls the network by `entry`: first come the rows of one adapter, then those of the next, and so on.

        Raises Unmixable.
        """


@dataclass(slots=True, eq=False)
class Entry:
    """A callable of a network: `forward`, or a VAE's `decode`."""

    name: str
    function: Callable[..., Any]
    parameters: tuple[str, ...]
    shared: frozenset[str]
    method: str = "forward"
    identity: Hashable = None
    """Equal for entries into the same network, however often they were made; of this object alone if None."""
    build: Hashable = None
    """Equal for entries into networks whose calls cost alike; as the identity if None."""

    @classmethod
    def of(cls, network: torch.nn.Module, method: str, label: str, shared: Sequence[str]) -> Entry:
        """The entry point `method` of `network`, labelled for logs; `shared` arguments have no batch dimension."""
        function = network if method == "forward" else getattr(network, method)
        parameters = tuple(inspect.signature(getattr(network, method)).parameters)
        name, kept = f"{label}.{method}", frozenset(shared)
        identity, build = (id(network), method, kept), (build_of(network), method, kept)
        return cls(name, function, parameters, kept, method, identity, build)


def build_of(network: torch.nn.Module) -> str:
    """A digest of a network's class and of its tensors' names, shapes, types and devices: equal ones cost alike.

    A model that comes back to the device is known by it, and so are models that differ in weights alone.
    """
    tensors = itertools.chain(network.named_parameters(), network.named_buffers())
    described = [(name, tuple(tensor.shape), str(tensor.dtype), str(tensor.device)) for name, tensor in tensors]
    text = repr((type(network).__module__, type(network).__qualname__, described))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


_carried: ContextVar[Adapter | None] = ContextVar("carried", default=None)


@contextlib.contextmanager
def carrying(adapter: Adapter) -> Iterator[None]:
    """Every forward made inside, by this program, carries the adapter: a program's greenlet has its own context."""
    token = _carried.set(adapter)
    try:
        yield
    finally:
        _carried.reset(token)


class Forward:
    """A call that a program waits on.

    `rows` is the first dimension of the first tensor argument that has one per row; `key` is equal for calls that may
    share a batch, `cost_key` for calls that cost alike, also of other networks of the same build, and `kind` for calls
    that would, were it not for their adapters.
    """

    __slots__ = ("_spec", "adapter", "args", "cost_key", "entry", "key", "kind", "kwargs", "leaves", "names", "rows")

    def __init__(self, entry: Entry, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Reads the call; the arguments are kept as they are."""
        self.entry, self.args, self.kwargs = entry, args, kwargs
        bound = {**dict(zip(entry.parameters, args, strict=False)), **kwargs}
        for name in _IGNORED:
            bound.pop(name, None)
        self.names: list[str] = []
        self.leaves: list[Any] = []
        self._spec: list[tuple[str, TreeSpec | None]] = []
        for name, value in bound.items():
            self._flatten(name, value)
        self.rows = self._count_rows()
        self.kind: Hashable = _interned(
            self._identity if entry.build is None else entry.build,
            tuple(self._spec),
            tuple([self._leaf_key(name, leaf) for name, leaf in zip(self.names, self.leaves, strict=True)]),
        )
        self._take(_carried.get())

    @property
    def _identity(self) -> Hashable:
        return id(self.entry) if self.entry.identity is None else self.entry.identity

    def _take(self, adapter: Adapter | None) -> None:
        self.adapter = adapter
        company = adapter.company if adapter else None
        self.cost_key: Hashable = self.kind if company is None else _interned("with", self.kind, company)
        self.key: Hashable = _interned("of", self._identity, self.cost_key)

    def _flatten(self, name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor) or type(value) in _PLAIN:
            self._spec.append((name, None))
            self.names.append(name)
            self.leaves.append(value)
            return
        leaves, spec = tree_flatten(value)
        self._spec.append((name, spec))
        self.names.extend([name] * len(leaves))
        self.leaves.extend(leaves)

    def _count_rows(self) -> int:
        fallback = 1
        for name, leaf in zip(self.names, self.leaves, strict=True):
            if isinstance(leaf, torch.Tensor) and leaf.ndim:
                if name != _TIMESTEP and name not in self.entry.shared:
                    return leaf.shape[0]
                fallback = leaf.shape[0] if name == _TIMESTEP else fallback
        return fallback

    def _leaf_key(self, name: str, leaf: Any) -> Hashable:
        if isinstance(leaf, torch.Tensor):
            if name == _TIMESTEP:
                return name
            if self.is_batched(name, leaf):
                return (leaf.shape[1:], leaf.dtype)
            return (leaf.shape, leaf.dtype, _content(leaf))
        kind = type(leaf)
        return (kind, leaf) if kind in _PLAIN else repr(leaf)

    def is_batched(self, name: str, leaf: torch.Tensor) -> bool:
        """Whether the tensor has one row per row of the call. A timestep of no dimension stands for all rows."""
        if name == _TIMESTEP:
            return True
        return leaf.ndim > 0 and leaf.shape[0] == self.rows and name not in self.entry.shared

    def run(self) -> Any:
        """Runs the call alone, exactly as it was made."""
        if self.adapter is None:
            return self.entry.function(*self.args, **self.kwargs)
        return self.adapter.run(self.entry, [(self.adapter, self.rows)], self.args, self.kwargs)

    def bare(self) -> Forward:
        """The call without its adapter."""
        if self.adapter is None:
            return self
        other = copy.copy(self)
        other._take(None)  # noqa: SLF001 - its own kind
        return other

    def rebuilt(self, leaves: Sequence[Any]) -> dict[str, Any]:
        """The call's arguments by name, with other leaves."""
        arguments, start = {}, 0
        for name, spec in self._spec:
            if spec is None:
                arguments[name] = leaves[start]
                start += 1
            else:
                arguments[name] = tree_unflatten(leaves[start : start + spec.num_leaves], spec)
                start += spec.num_leaves
        return arguments


_numbers = itertools.count()


@functools.lru_cache(maxsize=4096)
def _interned(*_parts: Hashable) -> int:
    """A number for what makes a kind of call, the same while the kind is in use: it is compared and looked up often."""
    return next(_numbers)


def _content(leaf: torch.Tensor) -> bytes:
    """A digest of the tensor's bytes, made once per tensor: reading it may mean waiting for a GPU.

    A tensor that is changed in place keeps its digest (tensors made in inference mode do not count their changes).
    The digest therefore only proposes company: whoever merges compares the tensors themselves.
    """
    kept = getattr(leaf, _CONTENT, None)
    if isinstance(kept, bytes):
        return kept
    flat = leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    digest = hashlib.blake2b(flat.tobytes(), digest_size=16).digest()
    setattr(leaf, _CONTENT, digest)
    return digest


def run_batch(calls: Sequence[Forward]) -> list[Any]:
    """Runs calls of equal key as one. Returns each call's answer, in order."""
    if len(calls) == 1:
        return [calls[0].run()]
    if all(call.adapter is None for call in calls):
        return _run_merged(calls, [(None, sum(call.rows for call in calls))])
    groups: dict[Adapter | None, list[int]] = {}
    for position, call in enumerate(calls):
        groups.setdefault(call.adapter, []).append(position)
    order = [position for positions in groups.values() for position in positions]
    spans = [(adapter, sum(calls[i].rows for i in positions)) for adapter, positions in groups.items()]
    try:
        answers = _run_merged([calls[position] for position in order], spans)
    except Unmixable:
        answers = [answer for positions in groups.values() for answer in run_batch([calls[i] for i in positions])]
    by_position = dict(zip(order, answers, strict=True))
    return [by_position[position] for position in range(len(calls))]


def _run_merged(calls: Sequence[Forward], spans: Sequence[tuple[Adapter | None, int]]) -> list[Any]:
    first = calls[0]
    merged: list[Any] = []
    for index, (name, leaf) in enumerate(zip(first.names, first.leaves, strict=True)):
        if not isinstance(leaf, torch.Tensor):
            merged.append(leaf)
        elif first.is_batched(name, leaf):
            merged.append(_concatenated(calls, index, name))
        elif all(_are_same(leaf, call.leaves[index]) for call in calls[1:]):
            merged.append(leaf)
        else:
            return [call.run() for call in calls]
    kwargs = first.rebuilt(merged)
    adapter = next((adapter for adapter, _ in spans if adapter), None)
    answer = adapter.run(first.entry, spans, (), kwargs) if adapter else first.entry.function(**kwargs)
    return _split(answer, [call.rows for call in calls])


def _concatenated(calls: Sequence[Forward], index: int, name: str) -> torch.Tensor:
    parts = [call.leaves[index] for call in calls]
    if name == _TIMESTEP:
        parts = [part.reshape(-1).expand(call.rows) for part, call in zip(parts, calls, strict=True)]
    return torch.cat(parts)


def _are_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether both hold the same now; if not, neither's digest is to be trusted any longer."""
    if one is other or torch.equal(one, other):
        return True
    for leaf in (one, other):
        vars(leaf).pop(_CONTENT, None)
    return False


def _split(answer: Any, rows: list[int]) -> list[Any]:
    """Each call's part of the answer: its rows of every tensor that has all rows, and the rest whole."""
    total = sum(rows)
    if type(answer) is tuple and all(isinstance(leaf, torch.Tensor) for leaf in answer):
        return list(zip(*[_rows_of(leaf, rows, total) for leaf in answer], strict=True))
    leaves, spec = tree_flatten(answer)
    parts = [_rows_of(leaf, rows, total) for leaf in leaves]
    return [tree_unflatten([part[i] for part in parts], spec) for i in range(len(rows))]


def _rows_of(leaf: Any, rows: list[int], total: int) -> list[Any]:
    if isinstance(leaf, torch.Tensor) and leaf.ndim and leaf.shape[0] == total:
        return list(leaf.split(rows))
    return [leaf] * len(rows)
