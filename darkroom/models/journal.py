"""What a denoising run leaves behind after each step, and how another run goes on from there.

Solver state is all that a step leaves: what the solver returned, the solver's own attributes, and the noise source. The
journal stands between the pipeline and its solver and networks. While it goes on from a snapshot it lets the pipeline
run its first k steps on blank answers, which costs no forward, and then puts the state in place: the pipeline's code
is never told. Rule kept: a snapshot holds copies, so what runs on cannot change it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import structlog
import torch

from darkroom.errors import InvalidCheckpoint
from darkroom.models.previews import clean_estimate
from darkroom.models.program import Ticket
from darkroom.models.standins import StandIn
from darkroom.models.stepcache import Cached, StepCache
from darkroom.models.trees import Unreadable, Unstorable, blank, from_tree, shape_of, to_tree

_log = structlog.get_logger()
_NOT_STATE = frozenset({"_internal_dict", "step"})


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state after a step: JSON, and the tensors that it names, on the CPU."""

    step: int
    step_count: int
    state: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())


@dataclass(frozen=True, slots=True)
class StepDone:
    """A solver step is done."""

    step: int
    step_count: int
    """Solver steps in all; more than asked for with solvers of second order."""
    snapshot: Snapshot | None
    """The state after it, where one was due."""
    previews: tuple[bytes, ...]
    """What the latents look like, one file per image, where that was due."""


class RangeDone(BaseException):
    """The last step that was asked for is done; not an Exception, so that pipelines do not catch it."""

    def __init__(self, latents: torch.Tensor) -> None:
        super().__init__()
        self.latents = latents


@dataclass(slots=True)
class Journal:
    """One request's. A second run of the same program goes on from the last snapshot kept."""

    ticket: Ticket
    on_step: Callable[[StepDone], None] = lambda _: None
    """Called on the engine's thread after each solver step that was really done."""
    snapshot_interval: int = 0
    """Steps between snapshots: 0 takes none, until the program has to leave."""
    every_step_limit_bytes: int = 1 << 20
    """Up to this size a snapshot is due after every step."""
    start: Snapshot | None = None
    """Where to go on from."""
    takes_latents_only: bool = False
    """Whether `start` is another model's, so that only its latents count: the solver and the noise begin anew."""
    to_step: int | None = None
    """The step after which to stop; None means all."""
    cache_threshold: float = 0.0
    """Relative change of a network's output below which it is answered from history; 0 runs every forward."""
    preview: Callable[[torch.Tensor], Sequence[bytes]] | None = None
    """Draws latents."""
    preview_interval: int = 0
    """Steps between previews; 0 draws none."""
    is_resumable: bool = True
    """False once the solver turned out to keep what no snapshot can hold."""
    done: int = field(default=0, init=False)
    _solver: Any = field(default=None, init=False)
    _loop: Any = field(default=None, init=False)
    _generators: Sequence[torch.Generator] = field(default=(), init=False)
    _device: torch.device = field(default=torch.device("cpu"), init=False)
    _at_start: dict[str, Any] | None = field(default=None, init=False)
    _outputs: Any = field(default=None, init=False)
    _shapes: dict[str, Any] = field(default_factory=dict, init=False)
    _size_bytes: int = field(default=0, init=False)
    _cache: StepCache = field(default_factory=lambda: StepCache(0.0), init=False)

    def begin(self, solver: Any, generators: Sequence[torch.Generator], device: torch.device, loop: Any = None) -> None:
        """Starts a run with this solver, whose `step` is from now on the journal's. `loop`: the pipeline.

        A solver that draws noise draws it from `generators`, also where its pipeline forgets to pass them on: else it
        would come from the process's own source, and a seed would not mean the same picture twice.
        """
        self._solver, self._generators, self._device, self._loop = solver, generators, device, loop
        self.done, self._at_start, self._outputs = 0, None, None
        self._shapes = dict(self.start.state["shapes"]) if self.start else {}
        self._cache = StepCache(self.cache_threshold)
        real_step = solver.step
        signature = inspect.signature(real_step)
        noise = {"generator": generators[0] if len(generators) == 1 else list(generators)}
        if "generator" not in signature.parameters:
            noise = {}

        @functools.wraps(real_step)  # pipelines read its signature to learn whether to pass the generator
        def step(*args: Any, **kwargs: Any) -> Any:
            if self._at_start is None:
                self._at_start = dict(solver.__dict__)
            if not self.is_skipping and not self.preview_interval:
                return self._note(None, real_step(*args, **noise | kwargs))
            given = signature.bind(*args, **kwargs).arguments
            if self.is_skipping:
                return self._skip(given["sample"], wants_tuple=given.get("return_dict") is False)
            return self._note(given["sample"], real_step(*args, **noise | kwargs))

        solver.step = step

    @property
    def is_skipping(self) -> bool:
        """Whether the run has not come to the step it goes on from."""
        return self.start is not None and self.done < self.start.step

    def watch(self, network: torch.nn.Module, label: str) -> torch.nn.Module:
        """What stands for a denoising network in this run."""
        cached = Cached(network, label, self._cache, lambda: (self.done, self.step_count))
        return Watched(cached if self.cache_threshold else network, label, self)

    @property
    def cached_forwards(self) -> int:
        """Forwards that were answered from history."""
        return self._cache.counts.answered

    def keep(self) -> None:
        """Makes the run's last finished step the one that the next run goes on from."""
        if self._outputs is not None and self.is_resumable:
            self.start, self.takes_latents_only = self._snapshot(), False

    @property
    def step_count(self) -> int:
        """Steps of the whole run, as the pipeline or the solver's timesteps say: fewer than asked for from an image."""
        said = getattr(self._loop, "_num_timesteps", None)
        if isinstance(said, int):
            return said
        begin: int = getattr(self._solver, "begin_index", None) or 0
        return len(self._solver.timesteps) - begin

    def blank_answer(self, label: str) -> Any:
        """Zeros in the shape of the network's answers. Raises InvalidCheckpoint for a network it never saw."""
        if label not in self._shapes:
            raise InvalidCheckpoint(f"knows nothing of network {label}")
        try:
            return blank(self._shapes[label], self._device)
        except Unreadable as error:
            raise InvalidCheckpoint(str(error)) from error

    def saw(self, label: str, answer: Any) -> None:
        """Notes the shape of a network's answers."""
        if label not in self._shapes:
            try:
                self._shapes[label] = shape_of(answer)
            except Unstorable as error:
                self._give_up(error)

    def _skip(self, sample: torch.Tensor, *, wants_tuple: bool) -> Any:
        assert self.start is not None
        self.done += 1
        outputs = self._stored("outputs", self._device)
        if not isinstance(outputs, tuple) or not outputs or not _fits(outputs[0], sample):
            raise InvalidCheckpoint("holds latents of another shape or type")
        if not self.is_skipping:
            self._restore()
            self._outputs = outputs
            self._end_range(outputs)
        return outputs if wants_tuple else _Returned(outputs)

    def _restore(self) -> None:
        assert self.start is not None
        if self.takes_latents_only:
            if hasattr(self._solver, "_step_index"):  # it counts from where the pipeline let it begin
                vars(self._solver)["_step_index"] = self.done + (getattr(self._solver, "begin_index", None) or 0)
            return
        solver = self._stored("solver", self._device)
        generators = self._stored("generators", torch.device("cpu"))
        if not isinstance(solver, dict) or any(_is_protected(self._solver, name) for name in solver):
            raise InvalidCheckpoint("sets what is no state of the solver")
        if not isinstance(generators, list) or len(generators) != len(self._generators):
            raise InvalidCheckpoint("holds the state of other noise sources")
        self._solver.__dict__.update(solver)
        try:
            for generator, rng in zip(self._generators, generators, strict=True):
                generator.set_state(rng)
        except (RuntimeError, TypeError) as error:
            raise InvalidCheckpoint("holds no state of a noise source") from error
        if self.cache_threshold:
            self._cache.load(self._stored("cache", self._device))

    def _stored(self, part: str, device: torch.device) -> Any:
        assert self.start is not None
        try:
            return from_tree(self.start.state[part], self.start.tensors, device)
        except Unreadable as error:
            raise InvalidCheckpoint(str(error)) from error

    def _note(self, before: torch.Tensor | None, answer: Any) -> Any:
        self.done += 1
        self._outputs = tuple(answer) if isinstance(answer, tuple) else tuple(answer.values())
        steps = self.step_count
        last = steps if self.to_step is None else min(steps, self.to_step)
        self._count_forwards_left(last)
        snapshot = self._snapshot() if self._is_snapshot_due else None
        self.on_step(StepDone(self.done, steps, snapshot, self._previews(before, answer)))
        self._end_range(self._outputs)
        return answer

    def _end_range(self, outputs: tuple[Any, ...]) -> None:
        """Stops after the last step asked for, unless it is the pipeline's last, which may have more to do then."""
        if self.done == self.to_step and self.done < self.step_count:
            raise RangeDone(outputs[0])

    def _previews(self, before: torch.Tensor | None, answer: Any) -> tuple[bytes, ...]:
        if self.preview is None or before is None or self.done % self.preview_interval:
            return ()
        after, *others = self._outputs
        predicted = getattr(answer, "pred_original_sample", None)
        if predicted is None and others and _fits(others[0], after):
            predicted = others[0]
        return tuple(self.preview(clean_estimate(self._solver, before, after, predicted)))

    @property
    def _is_snapshot_due(self) -> bool:
        if not self.snapshot_interval or not self.is_resumable:
            return False
        is_small = self._size_bytes <= self.every_step_limit_bytes
        return is_small or self.done % self.snapshot_interval == 0 or self.done == self.to_step

    def _count_forwards_left(self, last: int) -> None:
        skipped = self.start.step if self.start else 0
        per_step = max(1.0, self.ticket.forwards / max(1, self.done - skipped))
        self.ticket.forwards_left = max(1, round((last - self.done) * per_step))

    def _snapshot(self) -> Snapshot | None:
        tensors: dict[str, torch.Tensor] = {}
        assert self._at_start is not None
        changed = {
            name: value
            for name, value in self._solver.__dict__.items()
            if name not in _NOT_STATE and not _is_unchanged(value, self._at_start.get(name, _ABSENT))
        }
        try:
            state = {
                "outputs": to_tree(self._outputs, tensors),
                "solver": to_tree(changed, tensors),
                "generators": to_tree([generator.get_state() for generator in self._generators], tensors),
                "shapes": dict(self._shapes),
                "cache": to_tree(self._cache.state() if self.cache_threshold else None, tensors),
            }
        except Unstorable as error:
            self._give_up(error)
            return None
        snapshot = Snapshot(self.done, self.step_count, state, tensors)
        self._size_bytes = snapshot.size_bytes
        return snapshot

    def _give_up(self, error: Unstorable) -> None:
        _log.warning(
            "not_resumable", request_id=self.ticket.request_id, solver=type(self._solver).__name__, kind=str(error)
        )
        self.is_resumable = self.ticket.restartable = self.ticket.movable = False


class Watched(StandIn):
    """A denoising network as one request sees it: blank while the run skips, else its own."""

    def __init__(self, network: torch.nn.Module, label: str, journal: Journal) -> None:
        """`network` is the stand-in that all requests share."""
        super().__init__(network)
        self.__dict__.update(label=label, journal=journal)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The network's answer."""
        journal, label = self.__dict__["journal"], self.__dict__["label"]
        if journal.is_skipping:
            return journal.blank_answer(label)
        answer = self.__dict__["network"](*args, **kwargs)
        journal.saw(label, answer)
        return answer


class _Returned(tuple[Any, ...]):
    """A solver's answer, read by position or as `prev_sample`."""

    __slots__ = ()

    @property
    def prev_sample(self) -> Any:
        """The sample one step further."""
        return self[0]


_ABSENT = object()


def _is_unchanged(value: Any, before: Any) -> bool:
    """Whether an attribute is what it was before the first step. Containers change in place, so they never count."""
    if isinstance(value, list | dict) or type(value) is not type(before):
        return False
    if value is before:
        return True
    return isinstance(value, bool | int | float | str) and value == before


def _fits(value: Any, sample: Any) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and isinstance(sample, torch.Tensor)
        and (value.shape, value.dtype) == (sample.shape, sample.dtype)
    )


def _is_protected(solver: Any, name: str) -> bool:
    return name in _NOT_STATE or hasattr(type(solver), name) or not name.isidentifier()
