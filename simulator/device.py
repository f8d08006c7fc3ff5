"""An accelerator at work: one request after the other, or all that are ready together, step by step.

Or none: stages that compute on the cores of one machine, where everybody slows everybody.
"""

from collections import Counter, deque
from collections.abc import Callable
from functools import partial
from typing import Generic, Protocol, TypeVar

from simulator.clock import Action, Clock, Event
from simulator.costs import Work
from simulator.links import Link, Transfer
from simulator.workload import Request

_EPSILON = 1e-9


class Task(Protocol):
    """What an accelerator is given."""

    @property
    def request(self) -> Request:
        """Whose steps are run."""

    finish_s: float
    """When its answer is out."""


T = TypeVar("T", bound=Task)
Started = Callable[[T], None]
Finished = Callable[[T, float], None]
"""The task, and the seconds until its answer is out: what follows its steps keeps no accelerator busy."""


class OneByOne(Generic[T]):
    """Runs requests in the order in which they became ready."""

    def __init__(self, clock: Clock, work: Work, started: Started[T], finished: Finished[T]) -> None:
        self._clock, self._work, self._started, self._finished = clock, work, started, finished
        self._ready: deque[T] = deque()
        self._running: T | None = None
        self.busy_s = 0.0

    def add(self, task: T) -> None:
        """Runs it when its turn comes."""
        self._ready.append(task)
        self._next()

    def _next(self) -> None:
        if self._running or not self._ready:
            return
        task = self._running = self._ready.popleft()
        self._started(task)
        seconds = self._work.request_s(task.request)
        self.busy_s += seconds
        self._clock.after(seconds, self._end)

    def _end(self) -> None:
        task, self._running = self._running, None
        assert task is not None
        self._finished(task, 0.0)
        self._next()


class Together(Generic[T]):
    """Runs all that are ready at once: a round is a step of each, one batch per base model.

    A request's fixed seconds follow its steps and keep nobody busy: other stages' work.
    """

    def __init__(
        self, clock: Clock, work: Work, started: Started[T], finished: Finished[T], *, max_images: int
    ) -> None:
        self._clock, self._work, self._started, self._finished = clock, work, started, finished
        self._max_images = max_images
        self._ready: deque[T] = deque()
        self._steps_left: dict[T, float] = {}
        self._round_s, self._since_s = 0.0, 0.0
        self._event: Event | None = None
        self.busy_s = 0.0

    def add(self, task: T) -> None:
        """Runs it from the next step on, if there is room in the batch."""
        self._ready.append(task)
        self._go_on()

    def _image_count(self) -> int:
        return sum(task.request.image_count for task in self._steps_left)

    def _settle(self) -> None:
        """Notes the rounds since the last change."""
        passed_s = self._clock.now_s - self._since_s
        self._since_s = self._clock.now_s
        if self._steps_left:
            self.busy_s += passed_s
            for task in self._steps_left:
                self._steps_left[task] -= passed_s / self._round_s

    def _go_on(self) -> None:
        self._settle()
        while self._ready:
            task = self._ready[0]
            if self._steps_left and self._image_count() + task.request.image_count > self._max_images:
                break
            self._ready.popleft()
            self._started(task)
            self._steps_left[task] = task.request.step_count
        if self._event:
            self._event.cancel()
            self._event = None
        if self._steps_left:
            images: dict[str, int] = {}
            for task in self._steps_left:
                images[task.request.base] = images.get(task.request.base, 0) + task.request.image_count
            self._round_s = sum(self._work.round_s(count) for count in images.values())
            self._event = self._clock.after(max(min(self._steps_left.values()), 0.0) * self._round_s, self._end)

    def _end(self) -> None:
        self._settle()
        for task in [task for task, left in self._steps_left.items() if left <= _EPSILON * task.request.step_count]:
            del self._steps_left[task]
            self._finished(task, self._work.fixed_s)
        self._go_on()


class Process:
    """A stage's process on cores that others use too. It computes on one: Python runs one of its threads at a time."""

    def __init__(self, clock: Clock, cores: Link) -> None:
        self._clock, self._cores, self._own = clock, cores, Link("process", 1.0)

    def run(self, seconds: float, done: Action) -> None:
        """Work of so many seconds, beside whatever else the process is at."""
        Transfer(self._clock, (self._own, self._cores), seconds, done)

    def elsewhere(self, seconds: float, done: Action) -> None:
        """Work of other processes."""
        Process(self._clock, self._cores).run(seconds, done)


class InRounds(Generic[T]):
    """As `Together`, in a process on shared cores: a round is a step of each, and who comes joins the next one."""

    def __init__(
        self, clock: Clock, work: Work, started: Started[T], finished: Finished[T], *, max_images: int, process: Process
    ) -> None:
        self._clock, self._work, self._started, self._finished = clock, work, started, finished
        self._max_images, self._process = max_images, process
        self._ready: deque[T] = deque()
        self._steps_left: dict[T, int] = {}
        self._is_running = False
        self.busy_s = 0.0

    def add(self, task: T) -> None:
        """Runs it from the next round on, if there is room in the batch."""
        self._ready.append(task)
        if not self._is_running:
            self._next_round()

    def _next_round(self) -> None:
        images: Counter[str] = Counter()
        for task in self._steps_left:
            images[task.request.base] += task.request.image_count
        while self._ready and (not images or images.total() + self._ready[0].request.image_count <= self._max_images):
            task = self._ready.popleft()
            self._started(task)
            self._steps_left[task] = task.request.step_count
            images[task.request.base] += task.request.image_count
        self._is_running = bool(images)
        if images:
            seconds = sum(self._work.round_s(count) for count in images.values())
            self.busy_s += seconds
            self._process.run(seconds, self._end)

    def _end(self) -> None:
        for task in list(self._steps_left):
            self._steps_left[task] -= 1
            if not self._steps_left[task]:
                del self._steps_left[task]
                self._finished(task, self._work.fixed_s)
                self._process.elsewhere(self._work.fixed_s, partial(self._answer, task))
        self._next_round()

    def _answer(self, task: T) -> None:
        task.finish_s = self._clock.now_s
