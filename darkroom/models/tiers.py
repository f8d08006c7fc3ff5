"""Where a process has its stage's parts of models: on the device, in memory, on the machine's disk."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from darkroom.errors import StoreUnavailable, UnusableModel
from darkroom.models.loader import fetch_part, part_files
from darkroom.models.store.host import Corrupt
from darkroom.models.store.model_store import ModelStore
from darkroom.policy.worth import Tier


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """Bytes of a model on each tier; None where it is not there."""

    device_bytes: int | None = None
    host_bytes: int | None = None
    disk_bytes: int | None = None
    load_s: float | None = None
    """What bringing it to the device took."""


class PartTiers:
    """The parts of one stage. Its methods block, and may be called from any thread."""

    def __init__(self, store: ModelStore, stage: str) -> None:
        self._store, self._stage = store, stage
        self._known: set[str] = set()
        """What this process ever had: nobody else puts anything into its memory. Only grows, by atomic steps."""

    def bring(self, model_id: str, tier: Tier) -> None:
        """Brings a part to disk or memory. Raises ModelNotFound, UnusableModel or StoreUnavailable."""
        fetch_part(self._store, model_id, self._stage)
        self._known.add(model_id)
        if tier is Tier.DISK and not all(path.is_file() for path in self._files(model_id)):
            raise StoreUnavailable(model_id, "this node's disk has no room for its files")
        if tier is Tier.HOST:
            try:
                for path in self._files(model_id):
                    self._store.read(path)
            except (Corrupt, OSError) as error:
                raise UnusableModel(model_id, f"a file of its {self._stage} part is corrupt") from error

    def copies(self, loaded: Mapping[str, Copy], model_ids: Collection[str]) -> dict[str, Copy]:
        """What there is of these models and of those known, on any tier, but of which there is nothing."""
        self._known.update(loaded)
        asked = sorted(self._known.union(model_ids))
        found = {model_id: self._seen(loaded.get(model_id, Copy()), model_id) for model_id in asked}
        return {model_id: copy for model_id, copy in found.items() if copy != Copy()}

    def _seen(self, copy: Copy, model_id: str) -> Copy:
        paths = self._files(model_id)
        try:
            size_bytes = sum(self._store.size_bytes(path) for path in paths)
        except OSError:  # dropped just now
            return copy
        if not paths:
            return copy
        is_on_disk = all(path.is_file() for path in paths)
        is_in_memory = self._store.held_bytes(model_id) >= size_bytes
        return replace(
            copy, disk_bytes=size_bytes if is_on_disk else None, host_bytes=size_bytes if is_in_memory else None
        )

    def _files(self, model_id: str) -> list[Path]:
        return part_files(self._store, model_id, self._stage) or []
