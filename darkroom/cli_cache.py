"""`darkroom cache`: where models are, what is planned, and what an operator wants otherwise."""

import json
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from darkroom.cli_running import CachemgrAddress, cachemgr_address, run_command
from darkroom.client import Client, stage_name
from darkroom.v1 import cachemgr_pb2
from darkroom.wire.times import seconds

cache_app = typer.Typer(help="See and steer which models are where.", no_args_is_help=True)
_out = Console()

Model = Annotated[str, typer.Argument(help="Model id.")]
Stage = Annotated[Literal["", "encoder", "denoiser", "vae"], typer.Option(help="One stage. Default: all.")]
Replica = Annotated[str, typer.Option(help="One replica, by id. Default: whichever takes least, or all to drop.")]
Copies = Annotated[int, typer.Option(min=1, max=1000, help="Replicas of each stage.")]


@cache_app.command()
def describe(cachemgr: CachemgrAddress = "", *, as_json: Annotated[bool, typer.Option("--json")] = False) -> None:
    """Show what each replica has on which tier, how popular models are, and what is planned."""

    async def show() -> None:
        async with _client(cachemgr) as client:
            described = await client.cache()
        if as_json:
            print(json.dumps(_facts(described)))  # noqa: T201 - the answer
        else:
            _show(described)

    run_command(show())


@cache_app.command()
def prefetch(  # noqa: PLR0917 - a command's options
    model: Model,
    tier: Annotated[Literal["device", "host", "disk"], typer.Option(help="Where to.")] = "device",
    stage: Stage = "",
    replica: Replica = "",
    copies: Copies = 1,
    cachemgr: CachemgrAddress = "",
) -> None:
    """Bring a model near before it is asked for. Replicas do so when they are idle, or after 30 s."""

    async def ask() -> None:
        async with _client(cachemgr) as client:
            await client.prefetch(model, tier=tier, stage=stage, replica_id=replica, copy_count=copies)

    run_command(ask())


@cache_app.command()
def pin(
    model: Model,
    copies: Annotated[int, typer.Option(min=0, max=1000, help="Replicas of each stage; 0 means all.")] = 1,
    cachemgr: CachemgrAddress = "",
) -> None:
    """Keep a model on devices until it is unpinned."""

    async def ask() -> None:
        async with _client(cachemgr) as client:
            await client.pin(model, copy_count=copies)

    run_command(ask())


@cache_app.command()
def unpin(model: Model, cachemgr: CachemgrAddress = "") -> None:
    """End a pin."""

    async def ask() -> None:
        async with _client(cachemgr) as client:
            await client.unpin(model)

    run_command(ask())


@cache_app.command()
def drop(model: Model, stage: Stage = "", replica: Replica = "", cachemgr: CachemgrAddress = "") -> None:
    """Let a model go from devices and memory, once no request uses it. What is pinned stays."""

    async def ask() -> None:
        async with _client(cachemgr) as client:
            await client.drop(model, stage=stage, replica_id=replica)

    run_command(ask())


def _client(address: str) -> Client:
    return Client(router_address="", cachemgr_address=cachemgr_address(address))


def _facts(described: cachemgr_pb2.DescribeCacheResponse) -> dict[str, Any]:
    return {
        "leader_id": described.leader_id,
        "manager_id": described.manager_id,
        "term": described.plan.term,
        "version": described.plan.version,
        "replicas": {
            replica.replica_id: {
                residence.model_id: tiers for residence in replica.residences if (tiers := _tiers(residence))
            }
            for replica in described.replicas
        },
        "problems": [
            {"replica_id": replica_id, "model_id": residence.model_id, "problem": residence.problem}
            for replica_id, residence in _problems(described)
        ],
        "models": [
            {
                "model_id": asked.model_id,
                "band": _band(asked),
                "rate": asked.rate,
                "sites": [
                    {
                        "stage": stage_name(site.stage),
                        "machine": site.machine,
                        "replica_id": site.replica_id or None,
                        "warm_s": seconds(site.warm_duration),
                    }
                    for site in asked.sites
                ],
            }
            for asked in described.popularities
        ],
        "loras": {lora.lora_id: lora.rate for lora in described.loras},
        "orders": [
            {
                "replica_id": order.replica_id,
                "model_id": order.model_id,
                "tier": _tier(order.tier),
                "reason": order.reason,
                "done": order.done,
            }
            for order in described.plan.orders
        ],
        "releases": [{"replica_id": r.replica_id, "model_id": r.model_id} for r in described.plan.releases],
        "keeps": [{"replica_id": k.replica_id, "model_id": k.model_id} for k in described.plan.keeps],
        "pins": {pin.model_id: pin.copy_count for pin in described.pins},
    }


def _show(described: cachemgr_pb2.DescribeCacheResponse) -> None:
    leader = described.leader_id or "nobody"
    _out.print(f"{leader} leads in term {described.plan.term}, plan {described.plan.version}", highlight=False)
    held = Table("replica", "stage", "has", box=None, padding=(0, 2, 0, 0))
    for replica in described.replicas:
        has = (
            f"{residence.model_id} ({', '.join(f'{tier} {size / 1e6:.1f} MB' for tier, size in tiers.items())})"
            for residence in replica.residences
            if (tiers := _tiers(residence))
        )
        held.add_row(replica.replica_id, stage_name(replica.stage), "; ".join(has))
    _out.print(held)
    asked = Table("model", "band", "requests/s", "pinned", "a new replica is warm in", box=None, padding=(0, 2, 0, 0))
    pins = {pin.model_id: str(pin.copy_count or "all") for pin in described.pins}
    for row in described.popularities:
        new = [site for site in row.sites if not site.replica_id and stage_name(site.stage) == "denoiser"]
        where = f"{seconds(new[0].warm_duration):.0f} s on {new[0].machine}" if new else ""
        asked.add_row(row.model_id, _band(row), f"{row.rate:.2g}", pins.pop(row.model_id, ""), where)
    for model_id, copies in sorted(pins.items()):
        asked.add_row(model_id, "", "", copies, "")
    _out.print(asked)
    for order in described.plan.orders:
        state = "has brought" if order.done else "is to bring"
        line = f"{order.replica_id} {state} {order.model_id} to {_tier(order.tier)}: {order.reason}"
        _out.print(line, highlight=False, soft_wrap=True)
    for replica_id, residence in _problems(described):
        line = f"[yellow]{replica_id} could not bring {residence.model_id}: {escape(residence.problem)}[/]"
        _out.print(line, highlight=False, soft_wrap=True)


def _problems(described: cachemgr_pb2.DescribeCacheResponse) -> list[tuple[str, cachemgr_pb2.Residence]]:
    return [(each.replica_id, found) for each in described.replicas for found in each.residences if found.problem]


def _tiers(residence: cachemgr_pb2.Residence) -> dict[str, int]:
    names = ("device", "host", "disk")
    return {tier: getattr(residence, f"{tier}_bytes") for tier in names if residence.HasField(f"{tier}_bytes")}


def _tier(tier: int) -> str:
    return cachemgr_pb2.Tier.Name(tier).removeprefix("TIER_").lower()


def _band(asked: cachemgr_pb2.Popularity) -> str:
    return cachemgr_pb2.Band.Name(asked.band).removeprefix("BAND_").lower()
