"""Embeddings of earlier prompts, the least recently used dropped first, bounded in bytes."""

from collections import OrderedDict
from typing import NamedTuple

from darkroom.wire.tasks import LoraUse
from darkroom.wire.tensors import RawTensor

Embeddings = dict[str, RawTensor]


class CacheKey(NamedTuple):
    """Requests with equal keys have equal embeddings, bit for bit."""

    model_id: str
    prompt: str
    negative_prompt: str
    guided: bool
    deterministic: bool
    loras: tuple[LoraUse, ...] = ()


class EmbeddingCache:
    """A dictionary that forgets."""

    def __init__(self, *, limit_bytes: int) -> None:
        """`limit_bytes`: data of all embeddings and keys together; 0 keeps nothing."""
        self._limit_bytes = limit_bytes
        self._entries: OrderedDict[CacheKey, Embeddings] = OrderedDict()
        self.size_bytes = 0

    def get(self, key: CacheKey) -> Embeddings | None:
        """The embeddings, if they are still here."""
        if key in self._entries:
            self._entries.move_to_end(key)
        return self._entries.get(key)

    def put(self, key: CacheKey, embeddings: Embeddings) -> None:
        """Keeps the embeddings, and drops old ones until the bound holds."""
        if key in self._entries:
            self.size_bytes -= _size(key, self._entries.pop(key))
        self._entries[key] = embeddings
        self.size_bytes += _size(key, embeddings)
        while self.size_bytes > self._limit_bytes:
            self.size_bytes -= _size(*self._entries.popitem(last=False))


def _size(key: CacheKey, embeddings: Embeddings) -> int:
    return 4 * (len(key.prompt) + len(key.negative_prompt)) + sum(len(tensor.data) for tensor in embeddings.values())
