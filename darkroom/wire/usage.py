"""Reports of what requests used, between messages and values."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from darkroom.errors import InvalidField
from darkroom.v1 import cachemgr_pb2, stage_pb2
from darkroom.wire import fields
from darkroom.wire.times import duration, seconds

MAX_USAGES = 1024
MAX_LORAS = 64
MAX_COUNT = 1_000_000
MAX_RUN_S = 86_400.0
_MAX_SEQUENCE = (1 << 63) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """How often one stage's part of a model was used."""

    stage: str
    model_id: str
    count: int
    run_s: float
    """Of all of them together."""
    loras: tuple[tuple[str, int], ...] = ()
    """Ids, and how many runs used each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageReport:
    """What a router's requests used since its last report."""

    reporter_id: str
    sequence: int
    usages: tuple[Usage, ...]
    loads: tuple[tuple[str, int], ...] = ()
    """Replicas, and how many requests of this reporter run there."""


def stage_name(stage: int, field: str = "stage") -> str:
    """The stage as Python has it. Raises InvalidField."""
    names = {value: name.removeprefix("STAGE_").lower() for name, value in stage_pb2.Stage.items() if value}
    if stage not in names:
        raise InvalidField(field, f"must be one of {', '.join(names.values())}")
    return names[stage]


def parse_report(message: cachemgr_pb2.ReportUsageRequest) -> UsageReport:
    """The report, checked. Raises InvalidField."""
    for field in ("usages", "loads"):
        _check_length(field, len(getattr(message, field)), MAX_USAGES)
    return UsageReport(
        reporter_id=fields.check_replica_id(message.reporter_id, "reporter_id"),
        sequence=fields.check_range("sequence", message.sequence, 1, _MAX_SEQUENCE),
        usages=tuple(_usage(usage, f"usages[{place}]") for place, usage in enumerate(message.usages)),
        loads=tuple(
            (
                fields.check_replica_id(load.replica_id, f"loads[{place}].replica_id"),
                fields.check_range(f"loads[{place}].running_count", load.running_count, 0, MAX_COUNT),
            )
            for place, load in enumerate(message.loads)
        ),
    )


def _usage(message: cachemgr_pb2.Usage, field: str) -> Usage:
    count = fields.check_count(f"{field}.count", message.count, MAX_COUNT)
    run_s = seconds(message.run_duration)
    if not math.isfinite(run_s) or not 0 <= run_s <= MAX_RUN_S * count:
        raise InvalidField(f"{field}.run_duration", f"must be 0 to {MAX_RUN_S:g} s for each run, not {run_s:g} s")
    _check_length(f"{field}.loras", len(message.loras), MAX_LORAS)
    return Usage(
        stage=stage_name(message.stage, f"{field}.stage"),
        model_id=fields.check_model_id(message.model_id, f"{field}.model_id"),
        count=count,
        run_s=run_s,
        loras=tuple(
            (
                fields.check_model_id(lora.lora_id, f"{field}.loras[{place}].lora_id"),
                fields.check_count(f"{field}.loras[{place}].count", lora.count, MAX_COUNT),
            )
            for place, lora in enumerate(message.loras)
        ),
    )


def _check_length(field: str, length: int, most: int) -> None:
    if length > most:
        raise InvalidField(field, f"must have at most {most} entries, not {length}")


def report_message(report: UsageReport) -> cachemgr_pb2.ReportUsageRequest:
    """The report as it travels."""
    return cachemgr_pb2.ReportUsageRequest(
        reporter_id=report.reporter_id,
        sequence=report.sequence,
        usages=[_usage_message(usage) for usage in report.usages],
        loads=[
            cachemgr_pb2.ReplicaLoad(replica_id=replica_id, running_count=count) for replica_id, count in report.loads
        ],
    )


def _usage_message(usage: Usage) -> cachemgr_pb2.Usage:
    return cachemgr_pb2.Usage(
        stage=f"STAGE_{usage.stage.upper()}",
        model_id=usage.model_id,
        count=usage.count,
        run_duration=duration(usage.run_s),
        loras=[cachemgr_pb2.LoraUsage(lora_id=lora_id, count=count) for lora_id, count in usage.loras],
    )


def merged(usages: Iterable[Usage]) -> tuple[Usage, ...]:
    """Usages of one stage and model as one, within the bounds of a report: what is over them is left out."""
    found: dict[tuple[str, str], Usage] = {}
    for usage in usages:
        key = (usage.stage, usage.model_id)
        known = found.get(key)
        if known is None and len(found) == MAX_USAGES:
            continue
        found[key] = usage if known is None else _sum(known, usage)
    return tuple(found.values())


def _sum(one: Usage, other: Usage) -> Usage:
    count = one.count + other.count
    if count > MAX_COUNT:
        return one
    loras = dict(one.loras)
    for lora_id, used in other.loras:
        if lora_id in loras or len(loras) < MAX_LORAS:
            loras[lora_id] = loras.get(lora_id, 0) + used
    return Usage(
        stage=one.stage,
        model_id=one.model_id,
        count=count,
        run_s=one.run_s + other.run_s,
        loras=tuple(loras.items()),
    )
