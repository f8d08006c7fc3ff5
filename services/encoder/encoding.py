"""Prompts to embeddings: from the cache, from an equal request in flight, or from the text encoders."""

import asyncio
from dataclasses import dataclass, replace
from functools import partial

from darkroom.models import programs
from darkroom.models.adapters import check_uses
from darkroom.models.program import Ticket
from darkroom.models.replica import StageReplica
from darkroom.models.tensors import to_raw
from darkroom.wire.tasks import EncodeTask, LoraUse
from services.encoder.cache import CacheKey, EmbeddingCache, Embeddings
from services.encoder.text_loras import TextLoras


@dataclass(frozen=True, slots=True)
class Encoded:
    """Embeddings, and whether encoding them was somebody else's work."""

    embeddings: Embeddings
    cached: bool


class Encoding:
    """Encodes each prompt once, however many ask for it at the same time."""

    def __init__(self, replica: StageReplica, cache: EmbeddingCache) -> None:
        """Runs text encoders on `replica`."""
        self._replica, self._cache = replica, cache
        self._text_loras = TextLoras(replica.store)
        self._in_flight: dict[CacheKey, asyncio.Task[Embeddings]] = {}
        self._callers: dict[CacheKey, int] = {}

    async def encode(self, task: EncodeTask) -> Encoded:
        """The prompt's embeddings.

        Raises QueueFull, InvalidField, ModelNotFound, UnusableModel, LoraNotFound or UnusableLora.
        """
        async with self._replica.accepted():
            task = replace(task, loras=await self._of_text(task.loras))
            key = CacheKey(
                task.model_id, task.prompt, task.negative_prompt, task.guided, task.deterministic, task.loras
            )
            kept = self._cache.get(key)
            if kept is not None:
                return Encoded(kept, cached=True)
            joined = key in self._in_flight
            return Encoded(await self._join(key, task), cached=joined)

    async def _of_text(self, loras: tuple[LoraUse, ...]) -> tuple[LoraUse, ...]:
        """None where none of them changes the encoding: it need not wait for their weights, and is what others have.

        Else all of them, as errors name them by their positions. Raises InvalidField.
        """
        check_uses(loras)
        for use in loras:
            if await self._text_loras.may_change_text(use.lora_id):
                return loras
        return ()

    async def _join(self, key: CacheKey, task: EncodeTask) -> Embeddings:
        """Waits for the one encoding of this key; the last caller to leave ends it."""
        if key not in self._in_flight:
            self._in_flight[key] = asyncio.create_task(self._encode(key, task))
        work = self._in_flight[key]
        self._callers[key] = self._callers.get(key, 0) + 1
        try:
            return await asyncio.shield(work)
        finally:
            self._callers[key] -= 1
            if not self._callers[key]:
                del self._callers[key]
                self._in_flight.pop(key, None)
                work.cancel()

    async def _encode(self, key: CacheKey, task: EncodeTask) -> Embeddings:
        with self._replica.holding():  # the request that started this may leave before others that joined it
            part = await self._replica.part(task.model_id, task.loras)
            ticket = Ticket(request_id=task.request_id, alone=task.deterministic)
            async with self._replica.adapted(part, task.loras) as stand_ins:
                answer = await self._replica.run(partial(programs.encode, part, task, stand_ins), ticket)
        embeddings = {name: to_raw(value) for name, value in answer.items()}
        self._cache.put(key, embeddings)
        return embeddings
