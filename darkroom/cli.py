"""The `darkroom` command: `up` starts a cluster here, `run` draws a picture, `ps` and `models` show what is there.

Exit codes: 0 done, 1 the cluster refused or failed, 2 wrong usage, 3 no cluster to talk to, 130 interrupted.
"""

import asyncio
import contextlib
import json
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from darkroom import client as darkroom_client
from darkroom.cli_cache import cache_app
from darkroom.cli_options import (
    DeviceBudget,
    EvictionOption,
    HostCache,
    HourPrefetch,
    MergedPairs,
    Pool,
    StoreCache,
    StoreCacheSize,
    default_store,
    parse_scaled,
    parse_size,
    read_conditions,
)
from darkroom.cli_running import run_command, told
from darkroom.cli_show import models, ps
from darkroom.cli_simulate import simulate
from darkroom.cli_store import store_app
from darkroom.runtime.cluster import ClusterConfig, LocalCluster, clear_state, read_state, write_state

DEFAULT_ROUTER_PORT = 7600

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Serves diffusion models as separate gRPC services.",
    pretty_exceptions_enable=False,
)
app.add_typer(store_app, name="store")
app.add_typer(cache_app, name="cache")
app.command()(simulate)
_out, _err = Console(), Console(stderr=True)

StorePath = Annotated[
    str, typer.Option(envvar="DARKROOM_MODEL_STORE", help="Folder of models in diffusers' directory format, or a URL.")
]
RouterAddress = Annotated[
    str,
    typer.Option(envvar="DARKROOM_ROUTER", help="Router to talk to, host:port. Default: the cluster of `darkroom up`."),
]


@app.command()
def up(  # noqa: PLR0917 - a command's options
    encoders: Annotated[int, typer.Option(min=1)] = 1,
    denoisers: Annotated[int, typer.Option(min=1)] = 2,
    vaes: Annotated[int, typer.Option(min=1)] = 1,
    routers: Annotated[int, typer.Option(min=1, help="Routers; each takes requests.")] = 1,
    cachemgrs: Annotated[int, typer.Option(min=1, help="Cache managers; one leads.")] = 1,
    device: Annotated[str, typer.Option(help="torch device, for example cuda:0.")] = "cpu",
    threads: Annotated[int, typer.Option(min=1, help="torch threads of each stage process.")] = 1,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port of the router; 0 takes a free one.")
    ] = DEFAULT_ROUTER_PORT,
    model_store: StorePath = "",
    default_model: Annotated[str, typer.Option(help="Model of requests that name none.")] = "shapes",
    device_budget_bytes: DeviceBudget = None,
    host_cache_bytes: HostCache = None,
    pool_bytes: Pool = None,
    store_cache: StoreCache = None,
    store_cache_bytes: StoreCacheSize = None,
    eviction: EvictionOption = None,
    hour_prefetch: HourPrefetch = None,
    merged_pairs: MergedPairs = None,
    logs: Annotated[
        Path | None, typer.Option(help="Folder for the processes' logs. Default: one that goes with the cluster.")
    ] = None,
    *,
    reflection: Annotated[bool, typer.Option(help="Answer gRPC reflection.")] = True,
) -> None:
    """Start a whole cluster on this machine, in the foreground; Ctrl-C stops it."""
    config = _cluster_config(
        encoders=encoders,
        denoisers=denoisers,
        vaes=vaes,
        routers=routers,
        cachemgrs=cachemgrs,
        device=device,
        threads=threads,
        router_port=port,
        reflection=reflection,
        model_store=model_store or default_store(),
        default_model=default_model,
        device_budget_bytes=device_budget_bytes,
        host_cache_bytes=host_cache_bytes,
        pool_bytes=pool_bytes,
        store_cache=store_cache,
        store_cache_bytes=store_cache_bytes,
        eviction=eviction,
        hour_prefetch=hour_prefetch,
        merged_pairs=merged_pairs,
        log_folder=logs,
    )
    run_command(_up(config))


async def _up(config: ClusterConfig) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    cluster = LocalCluster(
        config, on_death=lambda name, code: _err.print(f"[yellow]{name} died with {code}; starting it again[/]")
    )
    with _err.status("Starting etcd, cache manager, router and stages…"):
        starting = asyncio.ensure_future(cluster.__aenter__())
        stopping = asyncio.ensure_future(stop.wait())
        await asyncio.wait([starting, stopping], return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            starting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await starting
            raise KeyboardInterrupt
        await starting
    try:
        write_state(cluster.addresses)
        _banner(config, cluster)
        await stop.wait()
        _err.print("Stopping: running requests finish first…")
    finally:
        clear_state(cluster.addresses)
        await cluster.stop()


def _banner(config: ClusterConfig, cluster: LocalCluster) -> None:
    where = cluster.addresses
    _out.print(
        f"[bold green]Darkroom is up[/] · {config.encoders} encoder · {config.denoisers} denoiser · {config.vaes} vae"
        f" on {config.device}"
    )
    routers = ", ".join([where.router, *where.other_routers])
    for name, address in (("router", routers), ("cache manager", where.cachemgr), ("etcd", where.etcd)):
        _out.print(f"  {name:14} {address}")
    _out.print(f"  {'logs':14} {cluster.log_folder}", soft_wrap=True)
    _out.print(
        'Draw:  [bold]darkroom run "a small red circle at the left on a white background" -o circle.png[/]',
        soft_wrap=True,
    )


@app.command()
def run(  # noqa: PLR0917 - a command's options
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="PNG file to write; several images get -0, -1, … before the suffix.")
    ] = Path("darkroom.png"),
    model: Annotated[str, typer.Option(help="Model id. Default: the router's.")] = "",
    steps: Annotated[int | None, typer.Option()] = None,
    guidance: Annotated[float | None, typer.Option()] = None,
    seed: Annotated[int | None, typer.Option(help="Default: random.")] = None,
    size: Annotated[str, typer.Option(help="WIDTHxHEIGHT in pixels. Default: the model's.")] = "",
    count: Annotated[int | None, typer.Option(help="Images to draw.")] = None,
    negative: Annotated[str, typer.Option(help="What to keep away from.")] = "",
    scheduler: Annotated[str, typer.Option(help="`darkroom models` lists them.")] = "",
    lora: Annotated[list[str] | None, typer.Option(help="ID or ID:SCALE; may be given several times.")] = None,
    image: Annotated[Path | None, typer.Option(help="Picture to start from, of the size that is drawn.")] = None,
    mask: Annotated[Path | None, typer.Option(help="Where to draw: white is drawn anew, black is kept.")] = None,
    strength: Annotated[float | None, typer.Option(help="Share of the steps done from --image, 0 to 1.")] = None,
    control: Annotated[
        list[str] | None, typer.Option(help="A ControlNet and its picture, ID=FILE or ID:SCALE=FILE; several times.")
    ] = None,
    ip_adapter: Annotated[
        list[str] | None, typer.Option(help="An IP-Adapter and its picture, ID=FILE or ID:SCALE=FILE; several times.")
    ] = None,
    step_cache: Annotated[float, typer.Option(help="Threshold, 0 to 1; 0.2 halves the work, 0 is exact.")] = 0.0,
    frames: Annotated[int, typer.Option(help="Frames of a video. Default: the pipeline's.")] = 0,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds the request may take.")] = 300.0,
    router: RouterAddress = "",
    model_store: StorePath = "",
    *,
    deterministic: Annotated[
        bool, typer.Option(help="Same pixels as plain diffusers, bit for bit: never batched.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON instead of text.")] = False,
) -> None:
    """Draw a picture. Starts a cluster for the occasion if none is up."""
    with told():
        width, height = parse_size(size)
        drawing = darkroom_client.Drawing(
            prompt=prompt,
            model_id=model,
            negative_prompt=negative,
            width_px=width,
            height_px=height,
            step_count=steps,
            guidance_scale=guidance,
            seed=seed,
            image_count=count,
            scheduler=scheduler,
            loras=tuple(parse_scaled("--lora", text) for text in lora or ()),
            conditions=read_conditions(
                image=image, mask=mask, strength=strength, controls=control or (), ip_adapters=ip_adapter or ()
            ),
            step_cache_threshold=step_cache,
            frame_count=frames,
            deterministic=deterministic,
        )
    store = model_store or default_store()
    run_command(_draw(drawing, output, router, store, timeout_s=timeout, as_json=as_json))


async def _draw(
    drawing: darkroom_client.Drawing, output: Path, router: str, store: str | Path, *, timeout_s: float, as_json: bool
) -> None:
    async with _some_router(router, store) as address, darkroom_client.Client(router_address=address) as client:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=_err, transient=True, disable=as_json or not _err.is_terminal) as bar:
            task = bar.add_task("waiting", total=None)
            drawn = await client.draw(
                drawing,
                timeout_s=timeout_s,
                on_progress=lambda p: bar.update(
                    task, description=p.stage, completed=p.step, total=p.step_count or None
                ),
            )
    files = write_images(drawn.images, output)
    stages = {stage.stage: round(stage.call_s, 4) for stage in drawn.stages}
    if as_json:
        answer = {"files": [str(f) for f in files], "seed": drawn.seed, "total_s": round(drawn.total_s, 4)}
        print(json.dumps({**answer, "stages_s": stages}))  # noqa: T201 - the answer
        return
    parts = " · ".join(f"{stage} {taken_s:.3f} s" for stage, taken_s in stages.items())
    _out.print(
        f"[green]{', '.join(map(str, files))}[/]  seed {drawn.seed} · {drawn.total_s:.3f} s: {parts}",
        soft_wrap=True,
        highlight=False,
    )


@contextlib.asynccontextmanager
async def _some_router(router: str, store: str | Path) -> AsyncIterator[str]:
    """The router asked for, else that of the cluster that is up, else that of a cluster started for the occasion."""
    known = read_state()
    if router or known:
        yield router or (known.router if known else "")
        return
    config = _cluster_config(encoders=1, denoisers=1, vaes=1, model_store=store)
    with _err.status("No cluster is up: starting one (`darkroom up` keeps one running)…"):
        cluster = await LocalCluster(config).__aenter__()
    try:
        yield cluster.addresses.router
    finally:
        await cluster.stop()


def write_images(images: tuple[bytes, ...], output: Path) -> list[Path]:
    """Writes the files; several get a number each."""
    output.parent.mkdir(parents=True, exist_ok=True)
    several = len(images) > 1
    files = [output.with_stem(f"{output.stem}-{i}") if several else output for i in range(len(images))]
    for file, data in zip(files, images, strict=True):
        file.write_bytes(data)
    return files


app.command()(ps)
app.command()(models)


def _cluster_config(**options: Any) -> ClusterConfig:
    try:
        return ClusterConfig(**options)
    except ValueError as error:
        _err.print(f"[red]{error}[/]")
        raise typer.Exit(2) from error


def main() -> None:
    """The command line."""
    if Path(sys.argv[0]).name == "darkroom":
        sys.argv[0] = "darkroom"
    app()
