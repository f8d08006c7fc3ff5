"""The training loop that every network here shares: steps or seconds, whichever ends first."""

import time
from collections.abc import Callable, Sequence

import torch


def descend(
    loss: Callable[[], torch.Tensor],
    parameters: Sequence[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    *,
    peak: float,
    steps: int,
    limit_s: float,
    warmup: int,
    note: Callable[[int, float, float], None] = lambda _step, _seconds, _loss: None,
    each: Callable[[int], None] = lambda _step: None,
) -> list[float]:
    """Minimises `loss`. The rate rises to `peak` over `warmup` steps and falls linearly with steps or time, to 1 %.

    Every 100 steps `note` hears the step, the seconds so far and the mean loss since; `each` is called after each step.
    Returns the loss of each step.
    """
    losses: list[float] = []
    start_s = time.monotonic()
    for step in range(steps):
        progress = max(step / steps, (time.monotonic() - start_s) / limit_s)
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = peak * min(1.0, (step + 1) / warmup) * max(0.01, 1 - progress)
        value = loss()
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(value.item())
        each(step)
        if step % 100 == 0:
            note(step, time.monotonic() - start_s, sum(losses[-100:]) / len(losses[-100:]))
    return losses
