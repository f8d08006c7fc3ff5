"""Latents to image files."""

import asyncio
import io
from dataclasses import dataclass

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from darkroom.models import checks, programs
from darkroom.models.program import Ticket
from darkroom.models.replica import StageReplica
from darkroom.models.tensors import to_torch
from darkroom.runtime.exchange import TensorSource
from darkroom.wire.tasks import DecodeTask


@dataclass(frozen=True, slots=True)
class ImageFile:
    """A PNG."""

    data: bytes
    width_px: int
    height_px: int


class Decoding:
    """Decodes requests on one replica."""

    def __init__(self, replica: StageReplica, source: TensorSource) -> None:
        """Runs on `replica`; latents that came by ref are fetched through `source`."""
        self._replica, self._source = replica, source

    async def decode(self, task: DecodeTask) -> list[ImageFile]:
        """One file per row of the latents, with the task's parameters in text chunks.

        Raises InvalidTensor, UnknownHolder, TensorNotFound, DigestMismatch, QueueFull, ModelNotFound or UnusableModel.
        """
        async with self._replica.accepted():
            part = await self._replica.part(task.model_id)
            latents = to_torch(await self._source.bring("latents", task.latents))
            checks.check_latents(part, task, latents)
            ticket = Ticket(request_id=task.request_id, alone=task.deterministic)
            images = await self._replica.run(lambda: programs.decode(part, task, latents), ticket)
            return await asyncio.to_thread(lambda: [_png(image, task.parameters) for image in images])


def _png(image: Image.Image, parameters: dict[str, str]) -> ImageFile:
    """Encodes a PNG; parameters outside Latin-1 become iTXt chunks, in UTF-8."""
    chunks = PngInfo()
    for key, value in sorted(parameters.items()):
        chunks.add_text(key, value) if value.isascii() else chunks.add_itxt(key, value)
    file = io.BytesIO()
    image.save(file, format="PNG", pnginfo=chunks)
    return ImageFile(file.getvalue(), image.width, image.height)
