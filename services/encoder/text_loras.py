"""Which LoRAs change how prompts are encoded, by the headers of their files.

The rule: one look at a LoRA at a time, on threads of its own: a store that does not answer keeps up nobody else.
"""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from darkroom.errors import DarkroomError
from darkroom.models.lora_file import changes_text
from darkroom.models.store.model_store import ModelStore
from darkroom.store.header import Malformed

_THREADS = 4
_MAX_KNOWN = 4096
_FRESH_S, _FRESH_FAILURE_S = 30.0, 5.0
"""Until the file is looked at again, beside the requests that ask meanwhile: it may have been replaced."""


@dataclass(frozen=True, slots=True)
class _Known:
    changes_text: bool
    until_s: float


class TextLoras:
    """What is known of LoRAs' files. Used on one event loop."""

    def __init__(self, store: ModelStore) -> None:
        """`store`: where the files are."""
        self._store = store
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="headers")
        self._known: dict[str, _Known] = {}
        self._looking: dict[str, asyncio.Task[_Known]] = {}

    async def may_change_text(self, lora_id: str) -> bool:
        """True of one that cannot be looked into: whoever reads it says what is wrong."""
        known = self._known.get(lora_id)
        if known is None or known.until_s <= asyncio.get_running_loop().time():
            if lora_id not in self._looking:
                self._looking[lora_id] = asyncio.create_task(self._look(lora_id))
            if known is None:
                known = await asyncio.shield(self._looking[lora_id])
        return known.changes_text

    async def _look(self, lora_id: str) -> _Known:
        loop = asyncio.get_running_loop()
        found, fresh_s = True, _FRESH_S
        try:
            found = await loop.run_in_executor(self._threads, changes_text, self._store, lora_id)
        except (DarkroomError, Malformed, OSError, ValueError):
            fresh_s = _FRESH_FAILURE_S
        finally:
            del self._looking[lora_id]
        if len(self._known) >= _MAX_KNOWN:
            self._known.clear()
        known = self._known[lora_id] = _Known(found, loop.time() + fresh_s)
        return known
