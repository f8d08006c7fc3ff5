"""Merged pairs at work: requests for a pair that is kept merged ask for it as if it were a base of its own."""

from dataclasses import replace

from darkroom.policy.fusion import Pair, choose_fused
from darkroom.policy.popularity import Popularity
from simulator.costs import Loader
from simulator.workload import Request


class Merging:
    """Which pairs are merged now."""

    def __init__(self, loader: Loader, lora_s: float) -> None:
        """`lora_s`: what adapters cost a request in its steps."""
        self._loader, self._lora_s = loader, lora_s
        self._asked = Popularity()
        self._merged: frozenset[str] = frozenset()

    def rewritten(self, request: Request, now_s: float) -> Request:
        """The request as workers get it."""
        if not request.loras:
            return request
        self._asked.add(request.pipeline, now_s)
        return replace(request, base=request.pipeline, loras=()) if request.pipeline in self._merged else request

    def choose(self, lost_per_second: float, now_s: float) -> None:
        """Merges what is worth it. `lost_per_second`: by requests for what another base in host memory pushes out."""
        adapter_s = self._loader.attach_s + self._lora_s
        pairs = {
            name: Pair(rate=rate, adapter_s=adapter_s, displaced_s=lost_per_second)
            for name, rate in self._asked.rates(now_s).items()
        }
        self._merged = frozenset(choose_fused(pairs, self._merged))
