"""Draws pictures through a router, all at once, and checks them: `python tests/compose/draw.py host:port count`.

Arguments after these are a command to run just before. Prints the ids of the denoisers that took part, and how many
calls had to be made again on another replica.
"""

import asyncio
import io
import subprocess
import sys

from PIL import Image

from darkroom.client import Client, Drawing, Drawn

_PROMPT = "a large red circle in the center on a white background"
_TIMEOUT_S = 90.0


async def draw(address: str, count: int) -> list[Drawn]:
    """Draws `count` pictures at once, each with a seed of its own."""
    async with Client(router_address=address) as client:
        drawings = [Drawing(prompt=_PROMPT, seed=seed) for seed in range(count)]
        return await asyncio.gather(*(client.draw(drawing, timeout_s=_TIMEOUT_S) for drawing in drawings))


def check(drawn: Drawn) -> None:
    """Raises ValueError unless the image is a 128 x 128 PNG of several colours with the prompt in a text chunk."""
    (data,) = drawn.images
    image = Image.open(io.BytesIO(data))
    if image.format != "PNG" or image.size != (128, 128):
        raise ValueError(f"the image is {image.format} {image.size}, not a 128 x 128 PNG")
    if _PROMPT not in image.info.values():
        raise ValueError(f"no text chunk holds the prompt: {image.info}")
    if len(image.getcolors(image.width * image.height) or ()) < 2:
        raise ValueError("the image is of a single colour")


def main(address: str, count: int, command: list[str]) -> None:
    """Runs the command, draws, checks, and prints."""
    if command:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    results = asyncio.run(draw(address, count))
    for drawn in results:
        check(drawn)
    denoisers = [stage for drawn in results for stage in drawn.stages if stage.stage == "denoiser"]
    print("denoisers", *sorted({stage.replica_id for stage in denoisers}))  # noqa: T201 - the answer
    print("repeated", sum(stage.attempt_count - 1 for stage in denoisers))  # noqa: T201 - the answer


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
