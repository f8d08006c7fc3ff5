"""What routers reported: how popular each stage's models are, and which replicas have something to do.

Every cache manager hears every report, so that whoever leads next knows what the leader knew.
"""

import json
from collections import OrderedDict
from collections.abc import Callable, Mapping

from darkroom.policy.popularity import Popularity
from darkroom.policy.worth import LoadTimes, Worth, WorthConfig
from darkroom.registry.json_fields import finite, items, text
from darkroom.wire.usage import UsageReport

_MAX_REPORTERS = 1024
_LOAD_AGE_S = 5.0
"""How long a reporter's word on who is busy counts."""
_MAX_SNAPSHOT_NAMES = 1000
"""Of each stage: the registry's values are small."""


class Ledger:
    """Counts usage. Times are seconds of a clock that all cache managers share."""

    def __init__(self, times: LoadTimes, *, is_known: Callable[[str], bool]) -> None:
        """`times`: until better is known; `is_known`: whether a model or LoRA exists: what does not is not counted."""
        self._times, self._is_known = times, is_known
        self._sequences: OrderedDict[str, int] = OrderedDict()
        self._loads: dict[str, tuple[float, frozenset[str]]] = {}
        self._asked_s: dict[tuple[str, str], float] = {}
        self.worths: dict[str, Worth] = {}
        """By stage."""
        self.loras = Popularity()

    def add(self, report: UsageReport, now_s: float) -> bool:
        """Counts a report. False, and nothing counted, for one that was counted before."""
        if report.sequence <= self._sequences.get(report.reporter_id, 0):
            return False
        self._sequences[report.reporter_id] = report.sequence
        self._sequences.move_to_end(report.reporter_id)
        if len(self._sequences) > _MAX_REPORTERS:
            self._loads.pop(self._sequences.popitem(last=False)[0], None)
        self._loads[report.reporter_id] = (now_s, frozenset(name for name, running in report.loads if running))
        for usage in report.usages:
            if self._is_known(usage.model_id):
                self.worth(usage.stage).add(usage.model_id, now_s, usage.run_s / usage.count, usage.count)
                self._asked_s[usage.stage, usage.model_id] = now_s
            for lora_id, count in usage.loras:
                if self._is_known(lora_id):
                    self.loras.add(lora_id, now_s, count)
        return True

    def worth(self, stage: str) -> Worth:
        """What a stage's copies are worth."""
        if stage not in self.worths:
            self.worths[stage] = Worth(Popularity(), self._times, WorthConfig())
        return self.worths[stage]

    def asked_s(self, stage: str, model_id: str) -> float | None:
        """When a report last said that a stage ran a model; None if none did here."""
        return self._asked_s.get((stage, model_id))

    def busy_ids(self, now_s: float) -> frozenset[str]:
        """Replicas that some router has a request at."""
        self._loads = {name: load for name, load in self._loads.items() if now_s - load[0] < _LOAD_AGE_S}
        return frozenset(replica_id for _, busy in self._loads.values() for replica_id in busy)

    def to_json(self, now_s: float) -> bytes:
        """All that `restore` needs, of the most popular."""
        stages = {
            stage: {
                name: [round(worth.run_s(name), 6), *(round(count, 6) for count in counts)]
                for name, counts in _most(worth.popularity.counts(now_s)).items()
            }
            for stage, worth in self.worths.items()
        }
        return json.dumps({"at_s": now_s, "stages": stages}, separators=(",", ":")).encode()

    def restore(self, value: bytes) -> None:
        """Takes over what another knew, of what is not known here. Raises ValueError for what is no snapshot."""
        try:
            fields = json.loads(value)
            at_s = finite(fields["at_s"])
            for stage, names in fields["stages"].items():
                rows = {text(name): [finite(number) for number in items(row)] for name, row in names.items()}
                worth = self.worth(text(stage))
                worth.popularity.restore({name: row[1:] for name, row in rows.items()}, at_s)
                for name, row in rows.items():
                    worth.restore(name, row[0])
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"not a snapshot of popularity: {error!r}") from error


def _most(counts: Mapping[str, tuple[float, ...]]) -> dict[str, tuple[float, ...]]:
    names = sorted(counts, key=lambda name: (-counts[name][-1], name))[:_MAX_SNAPSHOT_NAMES]
    return {name: counts[name] for name in names}
