"""Starts a whole cluster, draws a few prompts through it at once, shows where the time went, and cleans up.

make demo
"""

import asyncio
import io
import signal
import sys
import time
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from darkroom.client import Client, Drawing, Drawn
from darkroom.client import Progress as StageProgress
from darkroom.errors import DarkroomError
from darkroom.runtime.cluster import ClusterConfig, LocalCluster
from darkroom.runtime.processes import ChildFailed

OUT = Path("out")
NOT_READY = "the cluster did not become ready in time"
PROMPTS = (
    "a large red circle in the center on a white background",
    "a small blue star at the left on a beige background",
    "a large yellow ring at the right on a black background",
    "a small green triangle at the top on a white background",
    "a large purple diamond at the bottom on a gray background",
    "a small orange cross in the center on a black background",
    "a large cyan square at the left on a black background",
    "a small pink circle at the right on a gray background",
)
_console = Console(soft_wrap=True, highlight=False)


async def draw_all(client: Client) -> list[Drawn]:
    """Draws every prompt at the same time, a progress bar for each."""
    with Progress(
        TextColumn("{task.description:58}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[stage]}"),
        console=_console,
    ) as bars:

        async def draw(number: int, prompt: str) -> Drawn:
            bar = bars.add_task(prompt, total=None, stage="waiting")

            def show(progress: StageProgress) -> None:
                bars.update(bar, stage=progress.stage)
                if progress.step_count:
                    bars.update(bar, completed=progress.step, total=progress.step_count)

            drawn = await client.draw(Drawing(prompt=prompt, seed=number), timeout_s=120, on_progress=show)
            bars.update(bar, stage="done")
            return drawn

        return await asyncio.gather(*(draw(number, prompt) for number, prompt in enumerate(PROMPTS)))


def contact_sheet(pictures: list[Image.Image], columns: int, scale: int = 2) -> Image.Image:
    """All pictures in rows, enlarged."""
    width, height = pictures[0].width * scale, pictures[0].height * scale
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(
            picture.resize((width, height), Image.Resampling.NEAREST), (i % columns * width, i // columns * height)
        )
    return sheet


async def main() -> None:
    """The demo."""
    start_s = time.monotonic()
    config = ClusterConfig(preload=("shapes",), log_folder=OUT / "logs")
    with _console.status("Starting etcd, cache manager, router, encoder, 2 denoisers and vae, each a process…"):
        cluster = await LocalCluster(config).__aenter__()
    try:
        up_s = time.monotonic() - start_s
        _console.print(
            f"Cluster up in {up_s:.1f} s: {len(cluster.children)} processes, router {cluster.addresses.router}"
        )
        async with Client(router_address=cluster.addresses.router) as client:
            results = await draw_all(client)
    finally:
        await cluster.stop()
    pictures: list[Image.Image] = []
    for number, (prompt, drawn) in enumerate(zip(PROMPTS, results, strict=True)):
        file = OUT / f"{number}-{prompt.split(' on ')[0].replace(' ', '-')}.png"
        file.write_bytes(drawn.images[0])
        pictures.append(Image.open(io.BytesIO(drawn.images[0])))
        times = " · ".join(f"{stage.stage} {stage.call_s:.3f} s" for stage in drawn.stages)
        _console.print(
            f"{file}: {drawn.total_s:.3f} s = {times}; {drawn.batched_forward_count} UNet forwards shared a batch"
        )
    contact_sheet(pictures, columns=4).save(OUT / "contact-sheet.png")
    _console.print(
        f"{OUT / 'contact-sheet.png'}: all of them. Everything is stopped. {time.monotonic() - start_s:.1f} s in all."
    )


def run() -> int:
    """Runs the demo; on SIGINT and SIGTERM everything is stopped first."""
    OUT.mkdir(exist_ok=True)

    async def interruptible() -> None:
        work = asyncio.ensure_future(main())
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, work.cancel)
        await work

    try:
        asyncio.run(interruptible())
    except asyncio.CancelledError:
        _console.print("Interrupted; everything is stopped.")
        return 130
    except (DarkroomError, ChildFailed, TimeoutError, OSError) as error:
        _console.print(f"[red]The demo failed: {str(error) or NOT_READY}[/]; logs are in {OUT / 'logs'}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(run())
