"""`darkroom ps` and `darkroom models`: what is up, and what there is to draw with."""

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from darkroom import client as darkroom_client
from darkroom.cli_running import CachemgrAddress, cachemgr_address, run_command
from darkroom.v1 import cachemgr_pb2, stage_pb2

_out = Console()


def ps(cachemgr: CachemgrAddress = "", *, as_json: Annotated[bool, typer.Option("--json")] = False) -> None:
    """List the replicas that are up: stage, load, and the models each holds."""
    run_command(_ps(cachemgr, as_json=as_json))


async def _ps(cachemgr: str, *, as_json: bool) -> None:
    async with darkroom_client.Client(router_address="", cachemgr_address=cachemgr_address(cachemgr)) as client:
        reports = await client.replicas()
    rows = [_replica_row(report) for report in reports]
    if as_json:
        print(json.dumps(rows))  # noqa: T201 - the answer
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("replica", "stage", "address", "device", "load"):
        table.add_column(heading, no_wrap=True)
    table.add_column("holds", overflow="fold")
    for row in rows:
        table.add_row(row["replica_id"], row["stage"], row["address"], row["device"], _load(row), _holds(row))
    _out.print(table)


def _load(row: dict[str, Any]) -> str:
    if row["running"] is None:
        return "[red]does not answer[/]"
    return f"{row['running']} now, {row['finished']} done"


def _holds(row: dict[str, Any]) -> str:
    held = [
        f"{model_id}: {', '.join(f'{name} {size / 1e6:.1f} MB' for name, size in networks.items() if size)}"
        for model_id, networks in row["models"].items()
    ]
    held += [f"{name} merged: {size / 1e6:.1f} MB" for name, size in row["merged_pairs"].items()]
    return "; ".join(held)


def _pair_name(model_id: str, pair: stage_pb2.MergedPair) -> str:
    return "+".join([model_id, *(f"{lora.lora_id}:{lora.scale:g}" for lora in pair.loras)])


def _replica_row(report: darkroom_client.ReplicaReport) -> dict[str, Any]:
    listed, state = report.listed, report.state
    row: dict[str, Any] = {
        "replica_id": listed.replica_id,
        "stage": darkroom_client.stage_name(listed.stage),
        "address": listed.address,
        "device": listed.device,
        "running": None,
        "finished": None,
        "requests_per_batch": None,
        "models": {model_id: {} for model_id in listed.model_ids},
        "merged_pairs": {},
    }
    if state is not None:
        row["running"], row["finished"] = state.running_count, state.finished_count
        row["requests_per_batch"] = state.forward_count / state.batch_count if state.batch_count else 0.0
        row["models"] = {model.model_id: {n.name: n.resident_bytes for n in model.networks} for model in state.models}
        row["merged_pairs"] = {
            _pair_name(model.model_id, pair): pair.size_bytes for model in state.models for pair in model.merged_pairs
        }
    return row


def models(cachemgr: CachemgrAddress = "", *, as_json: Annotated[bool, typer.Option("--json")] = False) -> None:
    """List the models of the catalogue, with their defaults and schedulers."""
    run_command(_models(cachemgr, as_json=as_json))


async def _models(cachemgr: str, *, as_json: bool) -> None:
    async with darkroom_client.Client(router_address="", cachemgr_address=cachemgr_address(cachemgr)) as client:
        catalogue = await client.catalogue()
    found = catalogue.models
    if as_json:
        rows: list[dict[str, Any]] = [
            {
                "model_id": m.model_id,
                "pipeline": m.pipeline,
                "size_bytes": sum(c.size_bytes for c in m.components),
                "width_px": m.default_width_px,
                "height_px": m.default_height_px,
                "step_count": m.default_step_count,
                "guidance_scale": m.default_guidance_scale,
                "schedulers": list(m.schedulers),
            }
            for m in found
        ]
        rows += [{"lora_id": lora.lora_id, "base_model_id": lora.base_model_id} for lora in catalogue.loras]
        rows += [
            {f"{_role(guide)}_id": guide.guide_id, "pipelines": list(guide.pipelines)} for guide in catalogue.guides
        ]
        print(json.dumps(rows))  # noqa: T201 - the answer
        return
    table = Table("model", "pipeline", "size", "default", "schedulers")
    for m in found:
        size = f"{sum(c.size_bytes for c in m.components) / 1e6:.1f} MB"
        default = f"{m.default_width_px}x{m.default_height_px}, {m.default_step_count} steps"
        default += f", guidance {m.default_guidance_scale:g}"
        table.add_row(m.model_id, m.pipeline, size, default, ", ".join(m.schedulers))
    for lora in catalogue.loras:
        base = f"LoRA for {lora.base_model_id}" if lora.base_model_id else "LoRA"
        table.add_row(lora.lora_id, base, f"{lora.size_bytes / 1e6:.1f} MB", f"scale {lora.default_scale:g}", "")
    for guide in catalogue.guides:
        name = {"controlnet": "ControlNet", "ip_adapter": "IP-Adapter"}.get(_role(guide), "guide")
        base = guide.base_model_id or ", ".join(guide.pipelines)
        table.add_row(guide.guide_id, f"{name} for {base}", f"{guide.size_bytes / 1e6:.1f} MB", "", "")
    _out.print(table)


def _role(guide: cachemgr_pb2.GuideModel) -> str:
    return str(cachemgr_pb2.GuideModel.Role.Name(guide.role)).removeprefix("ROLE_").lower()
