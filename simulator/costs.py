"""What things weigh and how long they take: sizes, loads by tier, steps.

Sizes are in units of a median base model's, since the trace names none. Every base has a size of its own, drawn from
the spread of the trace's loads from afar (`basemodel_update_latency`, the mode above 25 s); the seconds by tier are
those of its three modes, as they were first read off its quantiles (`fitting` comes to 2.8, 22.4 and 38.6 s).
"""

import hashlib
import math
from dataclasses import dataclass
from statistics import NormalDist

from darkroom.policy.worth import LoadTimes
from simulator.workload import Request

_SPREAD = 0.17
"""Deviation of the logarithm of the loads from afar: 5 % of them take 1.32 times the median or more."""
_MOST_DEVIATIONS = 2.0
BASE_BYTES = 6.9e9
"""Of a median base model (SDXL, half precision), only to tell bytes: nothing depends on it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loader(LoadTimes):
    """How a node brings components to its device. Seconds for a median base."""

    attach_s: float
    """What a LoRA costs beside its bytes: parsing, and putting it on the base."""
    is_streaming: bool
    """Whether bytes from afar go to host memory as they come, and not by way of the disk."""
    overlaps: bool
    """Whether loads run beside the accelerator's work, and LoRAs load beside their base."""
    spread: float = 0.0
    """Of single reads from disk about their usual time: the deviation of the logarithm."""


PRODUCTION = Loader(network_s=16.1, disk_s=19.0, bus_s=2.9, attach_s=4.0, is_streaming=False, overlaps=False)
"""The trace: 2.9 s from the host, 21.9 s from disk, 38 s from afar; 4.4 s for a LoRA wherever it is."""
DIRECT = Loader(network_s=16.1, disk_s=5.7, bus_s=1.5, attach_s=0.2, is_streaming=True, overlaps=True)
"""The same network; loads from disk in 7.2 s, as SoCC'25 has them with direct I/O and pinned pools."""
FREE = Loader(network_s=0.0, disk_s=0.0, bus_s=0.0, attach_s=0.0, is_streaming=True, overlaps=True)
"""No load ever costs anything."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """How long a request keeps an accelerator busy."""

    fixed_s: float = 4.0
    """Of a request, beside its steps: encoding, decoding, orchestration."""
    step_s: float = 0.11
    """Of a step of one image."""
    marginal: float = 1.0
    """What one more image in a step costs, as a share of the first: 1 where nothing is gained by batching."""

    def request_s(self, request: Request) -> float:
        """Alone."""
        return self.fixed_s + request.step_count * self.round_s(request.image_count)

    def round_s(self, image_count: float) -> float:
        """A step of so many images together."""
        return self.step_s * (1 + self.marginal * (image_count - 1))


@dataclass(frozen=True, slots=True)
class Sizes:
    """What components weigh, in median bases; equal seeds give equal sizes."""

    seed: int
    spread: float = _SPREAD
    lora: float = 0.03
    """200 MB to a base's 6.9 GB."""

    def base(self, name: str) -> float:
        """Of a base model, or of one with LoRAs merged into it, `base+…`."""
        if not self.spread:
            return 1.0
        base, _, _ = name.partition("+")
        digest = hashlib.blake2b(f"{self.seed} {base}".encode(), digest_size=8).digest()
        share = (int.from_bytes(digest, "big") + 0.5) / 2**64
        deviations = max(-_MOST_DEVIATIONS, min(_MOST_DEVIATIONS, NormalDist().inv_cdf(share)))
        return math.exp(self.spread * deviations)


def gigabytes(size: float) -> float:
    """A size in GB."""
    return size * BASE_BYTES / 1e9
