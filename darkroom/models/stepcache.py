"""Answers some of a request's forwards from the request's own history, so that they never join a batch.

Off unless a request asks for it: answered pictures differ from computed ones. Works at a network's sample and output
only, so it fits every network, and holds one state per request, so requests at different steps share batches as ever.

When to answer, after EasyCache (Zhou et al., arXiv 2507.02860): an output changes about as fast as its sample, at a
rate k = |v - v'| / |x - x'| that two computed forwards give and that moves slowly. The output's relative change since
the last computed forward is then near k · |x - x'| / |v'|, which costs no forward; while it stays below the threshold,
the forward is answered. Here x' is the sample of the last computed forward, not of the last step.

With what, after TaylorSeer (Liu et al., arXiv 2503.06923), of first order in steps: v' + w · g · (v' - v''), where g is
the gap to the last computed forward in units of the gap before it. Solvers of second order amplify an overshoot, so w
is not 1 but what would have been best, by least squares, for the newest computed forward: from 0, plain reuse, to 1.

Rules kept: one number leaves the device per decision; what is kept is bounded and copied; a number that is no number
means that the network runs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from darkroom.errors import InvalidCheckpoint
from darkroom.models.standins import StandIn
from darkroom.models.trees import Output

FIRST_COUNT = 3
"""Steps at the start that always run: two computed forwards give the rate, the third the weight."""
LAST_COUNT = 2
"""Steps at the end that always run: no later step corrects what they get wrong."""
MAX_ANSWERED_IN_A_ROW = 3
_KEPT_COUNT = 2
MAX_STREAMS = 8
"""Networks times calls per step that are remembered; what is called beyond that always runs."""


@dataclass(frozen=True, slots=True)
class Call:
    """What the cache sees of a forward."""

    network: str
    """Its label: histories of different networks never mix."""
    sample: tuple[torch.Tensor, ...]
    """The tensors of its first argument that has any: what is being denoised."""
    step: int
    """Solver steps done, from 0."""
    step_count: int
    """Solver steps in all."""

    @classmethod
    def of(cls, network: str, args: Sequence[Any], kwargs: Mapping[str, Any], *, step: int, step_count: int) -> Call:
        """Reads a call; `sample` or `hidden_states` by name come first, then arguments in their order."""
        named = [kwargs[name] for name in ("sample", "hidden_states") if name in kwargs]
        for value in [*named, *args, *kwargs.values()]:
            tensors = tuple(leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, torch.Tensor))
            if tensors:
                return cls(network, tensors, step, step_count)
        return cls(network, (), step, step_count)


@dataclass(slots=True)
class CacheCounts:
    """Forwards of a request so far."""

    computed: int = 0
    answered: int = 0


@dataclass(slots=True)
class _Stream:
    """History of one call of one network: a pipeline with true guidance calls it twice per step."""

    structure: Any
    """The answer as JSON, its leaves numbered."""
    steps: list[int]
    """Steps of the computed forwards that are kept, at most two, newest last."""
    outputs: list[list[Any]]
    """Their leaves; none that changes between calls but tensors."""
    sample: list[torch.Tensor]
    """Of the newest computed forward."""
    rate: torch.Tensor | None = None
    """k / |v'|, or None after the first forward."""
    weight: torch.Tensor | None = None
    """w, or None before the third forward."""
    answered_in_a_row: int = 0
    like: TreeSpec | None = None
    """An answer's TreeSpec; None after a resume, when the answer is built from `structure`."""


class StepCache:
    """One request's. Per forward: `answer(call)`, and, where that is None, the network and then `note(call, answer)`.

    The first call of a step decides for the step. Others follow where they can: one half of a guided pair answered and
    the other computed would put the whole error into their difference, which guidance multiplies.
    """

    def __init__(self, threshold: float) -> None:
        """`threshold`: the relative change of an output below which it is not computed; 0 turns the cache off.

        0.1 to 0.3 is the useful range. Raises ValueError for a threshold that is negative or no number.
        """
        if not (math.isfinite(threshold) and threshold >= 0):
            raise ValueError(f"threshold must be a number of at least 0, not {threshold}")
        self.threshold = threshold
        self.counts = CacheCounts()
        self._streams: dict[tuple[str, int], _Stream] = {}
        self._step: int | None = None
        self._calls: dict[str, int] = {}
        self._verdict: bool | None = None
        self._key = ("", 0)

    @property
    def size_bytes(self) -> int:
        """Bytes held: per stream two outputs and one sample."""
        return sum(
            leaf.numel() * leaf.element_size()
            for stream in self._streams.values()
            for leaf in (*(leaf for output in stream.outputs for leaf in output), *stream.sample)
            if isinstance(leaf, torch.Tensor)
        )

    def answer(self, call: Call) -> Any | None:
        """The forward's answer from history, or None: then run the network and `note` what it said."""
        if self.threshold == 0:
            return None
        if call.step != self._step:
            self._step, self._calls, self._verdict = call.step, {}, None
        ordinal = self._calls.get(call.network, 0)
        self._calls[call.network] = ordinal + 1
        self._key = (call.network, ordinal)
        stream = self._usable(call)
        if self._verdict is None:
            self._verdict = stream is not None and self._is_near(stream, call)
        if stream is None or not self._verdict:
            return None
        stream.answered_in_a_row += 1
        self.counts.answered += 1
        leaves = _extrapolated(stream, call.step)
        return tree_unflatten(leaves, stream.like) if stream.like else _built(stream.structure, leaves)

    def note(self, call: Call, answer: Any) -> None:
        """Remembers what the network answered to the call that `answer` was last asked about."""
        if self.threshold == 0:
            return
        self.counts.computed += 1
        leaves, spec = tree_flatten(answer)
        kept = [_copied(leaf) for leaf in leaves]
        sample = [tensor.detach().clone() for tensor in call.sample]
        stream = self._streams.get(self._key)
        if stream is None or call.step <= stream.steps[-1] or not _match(stream, sample, kept):
            self._begin(call, answer, kept, sample, spec)
            return
        stream.rate = _mean_distance(kept, stream.outputs[-1]) / (
            _mean_distance(sample, stream.sample) * _mean_distance(kept, None)
        )
        if len(stream.steps) > 1:
            stream.weight = _best_weight(stream, kept, call.step)
        stream.steps, stream.outputs = [*stream.steps, call.step][-_KEPT_COUNT:], [*stream.outputs, kept][-_KEPT_COUNT:]
        stream.sample, stream.answered_in_a_row = sample, 0

    def _begin(self, call: Call, answer: Any, kept: list[Any], sample: list[torch.Tensor], spec: TreeSpec) -> None:
        has_room = self._key in self._streams or len(self._streams) < MAX_STREAMS
        numbers = itertools.count()
        structure = _structure(answer, numbers)
        if has_room and any(map(_is_real, sample)) and any(map(_is_real, kept)) and next(numbers) == len(kept):
            self._streams[self._key] = _Stream(structure, [call.step], [kept], sample, like=spec)

    def _usable(self, call: Call) -> _Stream | None:
        """The call's history, if it suffices to answer at this step."""
        stream = self._streams.get(self._key)
        is_middle = FIRST_COUNT <= call.step < call.step_count - LAST_COUNT
        if stream is None or not is_middle or stream.weight is None or not _same_shapes(stream.sample, call.sample):
            return None
        return stream

    def _is_near(self, stream: _Stream, call: Call) -> bool:
        if stream.answered_in_a_row >= MAX_ANSWERED_IN_A_ROW:
            return False
        assert stream.rate is not None
        change = (stream.rate * _mean_distance(call.sample, stream.sample)).item()  # the one wait for the device
        return change < self.threshold  # False for NaN

    def state(self) -> dict[str, Any]:
        """What `load` takes to decide the same from here on: dicts, lists, tensors, numbers. Made between steps."""
        names = ("structure", "steps", "outputs", "sample", "rate", "weight", "answered_in_a_row")
        streams = [
            {"network": network, "ordinal": ordinal, **{name: getattr(stream, name) for name in names}}
            for (network, ordinal), stream in self._streams.items()
        ]
        return {"computed": self.counts.computed, "answered": self.counts.answered, "streams": streams}

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on from another cache's state, of the same threshold. Raises InvalidCheckpoint."""
        try:
            counts = CacheCounts(int(state["computed"]), int(state["answered"]))
            streams = {(str(row["network"]), int(row["ordinal"])): _loaded(row) for row in state["streams"]}
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidCheckpoint("holds no state of a step cache") from error
        if len(streams) > MAX_STREAMS:
            raise InvalidCheckpoint("holds more of a step cache than there can be")
        self.counts, self._streams, self._step = counts, streams, None


class Cached(StandIn):
    """A network as one request sees it: a forward that the request's cache answers never reaches the network."""

    def __init__(
        self, network: torch.nn.Module, label: str, cache: StepCache, position: Callable[[], tuple[int, int]]
    ) -> None:
        """`position` says how many solver steps are done and how many there are in all."""
        super().__init__(network)
        self.__dict__.update(label=label, cache=cache, position=position)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The network's answer, or the cache's."""
        cache: StepCache = self.__dict__["cache"]
        if not cache.threshold:
            return self.__dict__["network"](*args, **kwargs)
        step, step_count = self.__dict__["position"]()
        call = Call.of(self.__dict__["label"], args, kwargs, step=step, step_count=step_count)
        answer = cache.answer(call)
        if answer is None:
            answer = self.__dict__["network"](*args, **kwargs)
            cache.note(call, answer)
        return answer


def _extrapolated(stream: _Stream, step: int) -> list[Any]:
    assert stream.weight is not None
    factor = stream.weight * _gap(stream, step)
    return [
        newest + (newest - before) * factor if _is_real(newest) else newest
        for newest, before in zip(stream.outputs[-1], stream.outputs[-2], strict=True)
    ]


def _gap(stream: _Stream, step: int) -> float:
    return (step - stream.steps[-1]) / (stream.steps[-1] - stream.steps[-2])


def _best_weight(stream: _Stream, computed: list[Any], step: int) -> torch.Tensor:
    """The w in [0, 1] that brings the extrapolation closest to what was computed: <v - v', d> / <d, d>."""
    over = under = torch.zeros((), device=stream.sample[0].device)
    for now, newest, before in zip(computed, stream.outputs[-1], stream.outputs[-2], strict=True):
        if _is_real(now):
            slope = (newest - before).float() * _gap(stream, step)
            over = over + ((now - newest).float() * slope).sum()
            under = under + slope.square().sum()
    return (over / under).nan_to_num(0.0, 0.0, 0.0).clamp(0, 1)


def _mean_distance(values: Sequence[Any], others: Sequence[Any] | None) -> torch.Tensor:
    """Mean absolute difference over all real leaves, or mean absolute value: one number, on the device."""
    pairs = zip(values, others if others is not None else [0.0] * len(values), strict=True)
    return torch.stack([(value - other).float().abs().mean() for value, other in pairs if _is_real(value)]).mean()


def _is_real(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point()


def _copied(leaf: Any) -> Any:
    """A copy: an answer is a view of its whole batch's, which would stay alive."""
    return leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf


def _match(stream: _Stream, sample: list[torch.Tensor], leaves: list[Any]) -> bool:
    newest = stream.outputs[-1]
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    kept = [leaf for leaf in newest if isinstance(leaf, torch.Tensor)]
    return len(leaves) == len(newest) and _same_shapes(stream.sample, sample) and _same_shapes(kept, tensors)


def _same_shapes(some: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> bool:
    return [(t.shape, t.dtype, t.device) for t in some] == [(t.shape, t.dtype, t.device) for t in others]


def _structure(answer: Any, numbers: Iterator[int]) -> Any:
    """The answer as JSON, with its leaves numbered in the order in which `tree_flatten` gives them."""
    if isinstance(answer, list | tuple):
        return {"list" if isinstance(answer, list) else "tuple": [_structure(item, numbers) for item in answer]}
    if isinstance(answer, dict):
        return {"output": {str(key): _structure(item, numbers) for key, item in answer.items()}}
    return {"leaf": next(numbers)}


def _built(structure: Any, leaves: list[Any]) -> Any:
    """An answer of this structure; output classes come back as something that is read like them."""
    match structure:
        case {"leaf": int(number)}:
            return leaves[number]
        case {"list": list(items)}:
            return [_built(item, leaves) for item in items]
        case {"tuple": list(items)}:
            return tuple(_built(item, leaves) for item in items)
        case {"output": dict(items)}:
            return Output({key: _built(item, leaves) for key, item in items.items()})
    raise ValueError("no structure of an answer")


def _loaded(row: Mapping[str, Any]) -> _Stream:
    """A stream from its state, checked so far that deciding cannot fail. Raises KeyError, TypeError or ValueError."""
    steps = [int(step) for step in row["steps"]]
    outputs = [[_copied(leaf) for leaf in output] for output in row["outputs"]]
    sample = [tensor.clone() for tensor in row["sample"] if isinstance(tensor, torch.Tensor)]
    rate, weight = row["rate"], row["weight"]
    is_ordered = 0 < len(steps) <= _KEPT_COUNT and steps == sorted(set(steps)) and len(outputs) == len(steps)
    is_measured = weight is None or (_is_number(weight) and _is_number(rate) and len(steps) == _KEPT_COUNT)
    is_sound = is_ordered and is_measured and (rate is None or _is_number(rate))
    if not (is_sound and any(map(_is_real, sample)) and _agree(outputs)):
        raise ValueError("no history of a network")
    try:
        _built(row["structure"], outputs[-1])
    except (IndexError, RecursionError) as error:
        raise ValueError("no structure of an answer") from error
    return _Stream(
        row["structure"], steps, outputs, sample, rate, weight, answered_in_a_row=int(row["answered_in_a_row"])
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim == 0 and value.is_floating_point()


def _agree(outputs: list[list[Any]]) -> bool:
    """Whether the outputs have the same leaves, at least one of them real."""
    shapes = [[t.shape if isinstance(t, torch.Tensor) else None for t in output] for output in outputs]
    return any(map(_is_real, outputs[0])) and shapes[0] == shapes[-1]
