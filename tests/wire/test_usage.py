"""Usage reports: what is sent arrives, what is out of bounds is refused by name, what is merged stays in bounds."""

from typing import Any

import pytest

from darkroom.errors import InvalidField
from darkroom.v1 import cachemgr_pb2, stage_pb2
from darkroom.wire.times import duration
from darkroom.wire.usage import (
    MAX_LORAS,
    MAX_USAGES,
    Usage,
    UsageReport,
    merged,
    parse_report,
    report_message,
)

REPORT = UsageReport(
    reporter_id="router-1",
    sequence=3,
    usages=(
        Usage(stage="denoiser", model_id="sd", count=2, run_s=3.5, loras=(("ink", 2), ("gold", 1))),
        Usage(stage="vae", model_id="sd", count=2, run_s=0.25),
    ),
    loads=(("denoiser-1", 2), ("denoiser-2", 0)),
)


def test_a_report_survives_the_wire() -> None:
    sent = report_message(REPORT).SerializeToString()
    assert parse_report(cachemgr_pb2.ReportUsageRequest.FromString(sent)) == REPORT


def usage(**changes: Any) -> cachemgr_pb2.Usage:
    fields = {"stage": stage_pb2.STAGE_VAE, "model_id": "sd", "count": 1, "run_duration": duration(1.0), **changes}
    return cachemgr_pb2.Usage(**fields)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"reporter_id": ""}, "reporter_id"),
        ({"reporter_id": "a/b"}, "reporter_id"),
        ({"sequence": 0}, "sequence"),
        ({"sequence": -1}, "sequence"),
        ({"usages": [usage()] * (MAX_USAGES + 1)}, "usages"),
        ({"usages": [usage(), usage(count=0)]}, "usages[1].count"),
        ({"usages": [usage(count=1_000_001)]}, "usages[0].count"),
        ({"usages": [usage(model_id="../x")]}, "usages[0].model_id"),
        ({"usages": [usage(stage=0)]}, "usages[0].stage"),
        ({"usages": [usage(stage=99)]}, "usages[0].stage"),
        ({"usages": [usage(run_duration=duration(-1.0))]}, "usages[0].run_duration"),
        ({"usages": [usage(run_duration=duration(86_401.0))]}, "usages[0].run_duration"),
        (
            {"usages": [usage(loras=[cachemgr_pb2.LoraUsage(lora_id="x", count=1)] * (MAX_LORAS + 1))]},
            "usages[0].loras",
        ),
        ({"usages": [usage(loras=[cachemgr_pb2.LoraUsage(lora_id="x")])]}, "usages[0].loras[0].count"),
        ({"loads": [cachemgr_pb2.ReplicaLoad(replica_id="a", running_count=-1)]}, "loads[0].running_count"),
        ({"loads": [cachemgr_pb2.ReplicaLoad()]}, "loads[0].replica_id"),
    ],
)
def test_what_is_out_of_bounds_is_refused_by_name(changes: dict[str, Any], field: str) -> None:
    request = cachemgr_pb2.ReportUsageRequest(**{"reporter_id": "router-1", "sequence": 1, **changes})
    with pytest.raises(InvalidField) as refused:
        parse_report(request)
    assert refused.value.facts["field"] == field


def test_merged_usages_add_up_and_stay_within_a_report() -> None:
    one, other = REPORT.usages[0], Usage(stage="denoiser", model_id="sd", count=1, run_s=1.0, loras=(("ink", 1),))
    (both,) = merged([one, other])
    assert both == Usage(stage="denoiser", model_id="sd", count=3, run_s=4.5, loras=(("ink", 3), ("gold", 1)))
    many = [Usage(stage="vae", model_id=f"m{n}", count=1, run_s=0.0) for n in range(MAX_USAGES + 5)]
    assert len(merged(many)) == MAX_USAGES
    most = Usage(stage="vae", model_id="sd", count=1_000_000, run_s=1.0)
    assert merged([most, most]) == (most,)
    loras = tuple((f"l{n}", 1) for n in range(MAX_LORAS))
    full = Usage(stage="vae", model_id="sd", count=1, run_s=0.0, loras=loras)
    more = Usage(stage="vae", model_id="sd", count=1, run_s=0.0, loras=(("new", 1), ("l0", 1)))
    (found,) = merged([full, more])
    assert len(found.loras) == MAX_LORAS
    assert dict(found.loras)["l0"] == 2
