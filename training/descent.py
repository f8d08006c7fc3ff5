"""The training loop that every network here shares: it may stop at any step, and goes on from there another day.

Time is CPU time of the process, so that a run that is paused, or shares its core, learns as much as any other.
"""

import copy
import math
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

_SECONDS_BETWEEN_SAVES = 150
_NOTE_EVERY = 100


@contextmanager
def _sigterm() -> Iterator[Callable[[], bool]]:
    """Whether SIGTERM came, which ends nothing by itself inside."""
    came = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: came.set())
    try:
        yield came.is_set
    finally:
        signal.signal(signal.SIGTERM, before)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How long a training lasts, over all its runs, and how fast it learns."""

    peak: float
    """Highest learning rate."""
    steps: int = 1_000_000_000
    """Steps of the whole training."""
    limit_s: float = math.inf
    """CPU seconds of the whole training; steps or seconds, whichever ends first."""
    run_s: float = math.inf
    """CPU seconds of this run, which may end before the training does."""
    warmup: int = 100
    """Steps over which the rate rises."""
    fall: float = 1.0
    """Share of the training, its last, over which the rate falls to 1 % of the peak."""
    decay: float = 0.0
    """Of the exponential averages of the weights; 0 keeps none."""
    weight_decay: float = 1e-4

    def progress(self, step: int, seconds: float) -> float:
        """Share of the training that is done: 1 at its end."""
        return max(step / self.steps, seconds / self.limit_s)

    def rate(self, step: int, progress: float) -> float:
        """The learning rate of a step."""
        return self.peak * min(1.0, (step + 1) / self.warmup) * min(1.0, max(0.01, (1 - progress) / self.fall))


class Descent:
    """Networks in training, their averages, and how far they have come.

    Invariant: stopped after any save and made anew, it goes on with the same weights, averages, optimizer and draws.
    """

    def __init__(
        self, name: str, networks: Mapping[str, nn.Module], plan: Plan, *, seed: int, folder: Path | None = None
    ) -> None:
        """Goes on from `folder`/`name`.pt if it is there; without a folder nothing is kept and nothing logged."""
        self.rng = random.Random(seed)
        torch.manual_seed(seed)
        self.step, self.seconds = 0, 0.0
        self._name, self._networks, self.plan, self._folder = name, dict(networks), plan, folder
        self._live: list[torch.Tensor] = [
            p for network in networks.values() for p in network.parameters() if p.requires_grad
        ]
        self._averages = {
            key: copy.deepcopy(network).eval().requires_grad_(requires_grad=False) if plan.decay else network
            for key, network in networks.items()
        }
        self._mean: list[torch.Tensor] = [
            mean
            for key, network in networks.items()
            for mean, live in zip(self._averages[key].parameters(), network.parameters(), strict=True)
            if live.requires_grad
        ]
        self._optimizer = torch.optim.AdamW(
            self._live, lr=plan.peak, weight_decay=plan.weight_decay, betas=(0.9, 0.99), fused=True
        )
        if self._state and self._state.exists():
            self._load(self._state)

    @property
    def is_done(self) -> bool:
        """Whether the plan has ended, not just this run."""
        return self.plan.progress(self.step, self.seconds) >= 1

    def averaged(self, key: str) -> nn.Module:
        """The average of a network's weights, which is what is shipped; the network itself where none is kept."""
        return self._averages[key]

    def run(self, loss: Callable[[], torch.Tensor], *, each: Callable[[int], None] = lambda _step: None) -> list[float]:
        """Minimises `loss` until the plan ends; `each` is called after each step. Returns the loss of each step.

        SIGTERM ends the run after the step at hand.
        """
        losses: list[float] = []
        began_s, ran_s, saved_s = time.process_time() - self.seconds, self.seconds, self.seconds
        with _sigterm() as is_asked_to_stop:
            while not self.is_done and self.seconds - ran_s < self.plan.run_s and not is_asked_to_stop():
                rate = self.plan.rate(self.step, self.plan.progress(self.step, self.seconds))
                losses.append(self._descend(loss(), rate))
                self.step += 1
                self.seconds = time.process_time() - began_s
                each(self.step)
                if self.step % _NOTE_EVERY == 0:
                    self.note(f"loss {sum(losses[-_NOTE_EVERY:]) / len(losses[-_NOTE_EVERY:]):.4f}")
                if self.seconds - saved_s > _SECONDS_BETWEEN_SAVES:
                    self.save()
                    saved_s = self.seconds
        self.save()
        return losses

    def note(self, text: str) -> None:
        """Appends a line to the training's log."""
        if self._folder:
            with (self._folder / f"{self._name}.log").open("a") as out:
                out.write(f"{self._name} {self.step} {self.seconds:.0f}s {text}\n")

    def save(self) -> None:
        """Keeps all that is needed to go on, replacing what was kept before in one go."""
        if not self._state:
            return
        state = {
            "networks": {key: network.state_dict() for key, network in self._networks.items()},
            "averages": {key: network.state_dict() for key, network in self._averages.items()},
            "optimizer": self._optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "torch_random": torch.get_rng_state(),
            "python_random": self.rng.getstate(),
        }
        self._state.parent.mkdir(parents=True, exist_ok=True)
        partial = self._state.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self._state)

    def _load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        for key, network in self._networks.items():
            network.load_state_dict(state["networks"][key])
            self._averages[key].load_state_dict(state["averages"][key])
        self._optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]
        torch.set_rng_state(state["torch_random"])
        self.rng.setstate(state["python_random"])

    @property
    def _state(self) -> Path | None:
        return self._folder / f"{self._name}.pt" if self._folder else None

    def _descend(self, value: torch.Tensor, rate: float) -> float:
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(self._live, 1.0)
        self._optimizer.step()
        self._average()
        return value.item()

    @torch.no_grad()
    def _average(self) -> None:
        if self.plan.decay:
            decay = min(self.plan.decay, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(self._mean, self._live, 1 - decay)
            for key, network in self._networks.items():  # statistics of batches are averages already
                for mean, live in zip(self._averages[key].buffers(), network.buffers(), strict=True):
                    mean.copy_(live)
