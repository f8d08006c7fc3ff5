"""Being in the cluster and seeing it: a replica says that it is up and what it holds; everyone sees who does.

The rule: what a replica says lives under its lease, so a dead one falls silent by itself, and what is said is repeated
whenever the lease was lost. A view that is cut off keeps what it last saw.
"""

import asyncio
import json
import logging
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from typing import Any, Generic, TypeVar

from darkroom.errors import RegistryUnavailable
from darkroom.registry import keys
from darkroom.registry.json_fields import whole, whole_or_none, yes
from darkroom.registry.model_entry import Entry, GuideEntry, LoraEntry, ModelEntry, parse_entry
from darkroom.registry.port import LeaseId, Member, Registry, Rooms
from darkroom.registry.residence import LOADED, Residence

T = TypeVar("T")

_LOG = logging.getLogger(__name__)

_MAX_KEEP_ALIVE_INTERVAL_S = 1.0
"""Also how long a lease's loss may go unnoticed: a replica is missing for hardly longer than that."""
_RETRY_S = 0.25
"""Between two attempts while the registry is away."""
_LEAVE_DEADLINE_S = 1.0

_ADDRESS = re.compile(r"[^\s/@]{1,255}:[0-9]{1,5}")


class Registration:
    """Keeps one member in the registry, with the models it holds."""

    def __init__(self, registry: Registry, member: Member, *, ttl_s: int = 5) -> None:
        """`ttl_s` is how long a dead process stays listed. Raises ValueError for a name that cannot be a key."""
        self._registry = registry
        self._key = keys.member(member.stage, member.replica_id)
        self._value = _member_json(member)
        self._replica_id = member.replica_id
        self._ttl_s = ttl_s
        self._lease: LeaseId | None = None
        self._lease_ends_s = 0.0
        self._residences: dict[str, Residence] = {}
        self._are_models_written = True
        self._written: dict[str, bytes] | None = None
        """What the registry has under the lease; None if that has to be read."""
        self._has_left = False
        self._writing = asyncio.Lock()

    @property
    def is_registered(self) -> bool:
        """Whether the lease holds, as far as this process can know."""
        return self._lease is not None and asyncio.get_running_loop().time() < self._lease_ends_s

    async def run(self) -> None:
        """Registers, and again whenever the lease is lost, until cancelled or until `leave`."""
        while not self._has_left:
            try:
                if not await self._is_lease_alive():
                    await self._register()
                await self._write_models()
                pause_s = min(self._ttl_s / 3, _MAX_KEEP_ALIVE_INTERVAL_S)
            except RegistryUnavailable as error:
                _LOG.debug("replica %s waits for the registry: %s", self._replica_id, error)
                pause_s = _RETRY_S
            await asyncio.sleep(pause_s)

    async def set_models(self, model_ids: Collection[str]) -> None:
        """Replaces what the replica says it holds by models on its device, without saying how large they are."""
        await self.set_residences(dict.fromkeys(model_ids, LOADED))

    async def set_residences(self, residences: Mapping[str, Residence]) -> None:
        """Replaces what the replica says it holds, by model.

        While the registry is away it is remembered, and said afterwards. Raises ValueError for an id that cannot be
        part of a key.
        """
        for model_id in residences:
            keys.residency(self._replica_id, model_id)
        self._residences = dict(residences)
        self._are_models_written = False
        try:
            await self._write_models()
        except RegistryUnavailable as error:
            _LOG.debug("replica %s says later what it holds: %s", self._replica_id, error)

    async def leave(self) -> None:
        """Vanishes from the registry now, and for good. If that takes over a second, the lease's end does it."""
        self._has_left = True
        try:
            async with asyncio.timeout(_LEAVE_DEADLINE_S), self._writing:
                lease, self._lease = self._lease, None
                if lease is not None:
                    await self._registry.revoke(lease)
        except (RegistryUnavailable, TimeoutError) as error:
            _LOG.debug("replica %s leaves when its lease ends: %s", self._replica_id, error)

    async def _is_lease_alive(self) -> bool:
        if self._lease is None:
            return False
        asked_s = asyncio.get_running_loop().time()
        left_s = await self._registry.keep_alive(self._lease)
        self._lease_ends_s = asked_s + left_s
        return left_s > 0

    async def _register(self) -> None:
        async with self._writing:
            if self._has_left:
                return
            asked_s = asyncio.get_running_loop().time()
            lease = await self._registry.grant(self._ttl_s)
            await self._registry.put(self._key, self._value, lease=lease)
            self._lease, self._lease_ends_s = lease, asked_s + self._ttl_s
            self._are_models_written, self._written = False, None

    async def _write_models(self) -> None:
        async with self._writing:
            lease, residences = self._lease, self._residences
            if lease is None or self._are_models_written:
                return
            wanted = {
                keys.residency(self._replica_id, name): residence.to_json() for name, residence in residences.items()
            }
            written, self._written = self._written, None  # which it stays if a write fails
            if written is None:
                written = dict.fromkeys(await self._registry.read(keys.residency_of(self._replica_id)), b"unknown")
            for key in sorted(wanted):
                if written.get(key) != wanted[key]:
                    await self._registry.put(key, wanted[key], lease=lease)
            for key in written.keys() - wanted.keys():
                await self._registry.delete(key)
            self._written = wanted
            self._are_models_written = residences is self._residences


class _Shelf(Generic[T]):
    """What was last read under one prefix, parsed. Parses, and complains about, only what is new."""

    def __init__(self, prefix: str, parse: Callable[[str, bytes], T]) -> None:
        self.prefix = prefix
        self.is_read = False
        self.values: dict[str, T] = {}
        self._parse = parse
        self._state: dict[str, bytes] = {}

    def update(self, state: dict[str, bytes]) -> None:
        """Makes the values those of `state`, without the entries that cannot be parsed."""
        for key in self._state.keys() - state.keys():
            self.values.pop(key, None)
        for key, value in state.items():
            if self._state.get(key) != value:
                self._put(key, value)
        self._state = state
        self.is_read = True

    def _put(self, key: str, value: bytes) -> None:
        try:
            self.values[key] = self._parse(key, value)
        except ValueError as error:
            _LOG.warning("registry entry is passed over: %s", error)
            self.values.pop(key, None)


class ClusterView:
    """Who is up, what they hold and which models exist, as last seen. Reading it costs no I/O and never fails."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._member_shelf = _Shelf(keys.MEMBERS, _parse_member)
        self._residency_shelf = _Shelf(keys.RESIDENCY, _parse_residency)
        self._entry_shelf = _Shelf(keys.MODELS, _parse_entry)
        self._members: tuple[Member, ...] = ()
        self._held: dict[str, tuple[str, ...]] = {}
        self._residences: dict[str, dict[str, Residence]] = {}
        self._models: dict[str, ModelEntry] = {}
        self._loras: dict[str, LoraEntry] = {}
        self._guides: dict[str, GuideEntry] = {}
        self._changed = asyncio.Event()

    @property
    def is_ready(self) -> bool:
        """Whether members, residency and catalogue were all seen once."""
        return self._member_shelf.is_read and self._residency_shelf.is_read and self._entry_shelf.is_read

    def members(self, stage: str | None = None) -> tuple[Member, ...]:
        """Who is up, of one stage or of all, by stage and replica_id."""
        return self._members if stage is None else tuple(member for member in self._members if member.stage == stage)

    def models_of(self, replica_id: str) -> tuple[str, ...]:
        """The ids of the models that the replica says are on its device, sorted."""
        return self._held.get(replica_id, ())

    def residences_of(self, replica_id: str) -> Mapping[str, Residence]:
        """What the replica says it has on any tier, by model_id, sorted."""
        return self._residences.get(replica_id, {})

    def models(self) -> tuple[ModelEntry, ...]:
        """The catalogue's models, by model_id."""
        return tuple(self._models.values())

    def model(self, model_id: str) -> ModelEntry | None:
        """The catalogue's entry, if there is one."""
        return self._models.get(model_id)

    def loras(self) -> tuple[LoraEntry, ...]:
        """The catalogue's LoRAs, by lora_id."""
        return tuple(self._loras.values())

    def lora(self, lora_id: str) -> LoraEntry | None:
        """The catalogue's entry, if there is one."""
        return self._loras.get(lora_id)

    def guides(self) -> tuple[GuideEntry, ...]:
        """The catalogue's ControlNets and IP-Adapters, by guide_id."""
        return tuple(self._guides.values())

    def guide(self, guide_id: str) -> GuideEntry | None:
        """The catalogue's entry, if there is one."""
        return self._guides.get(guide_id)

    async def run(self) -> None:
        """Follows the registry until cancelled."""
        async with asyncio.TaskGroup() as following:
            following.create_task(self._follow(self._member_shelf, self._index_members))
            following.create_task(self._follow(self._residency_shelf, self._index_residency))
            following.create_task(self._follow(self._entry_shelf, self._index_entries))

    async def wait_for(self, predicate: Callable[["ClusterView"], bool]) -> None:
        """Returns as soon as the predicate holds; asked now and after each change. The caller sets the deadline."""
        while not predicate(self):
            await self._changed.wait()

    async def _follow(self, shelf: _Shelf[T], index: Callable[[], None]) -> None:
        async for state in self._registry.watch(shelf.prefix):
            shelf.update(state)
            index()
            self._changed.set()
            self._changed = asyncio.Event()

    def _index_members(self) -> None:
        found = self._member_shelf.values.values()
        self._members = tuple(sorted(found, key=lambda member: (member.stage, member.replica_id)))

    def _index_residency(self) -> None:
        residences: dict[str, dict[str, Residence]] = {}
        for _, (key, residence) in sorted(self._residency_shelf.values.items(), key=lambda item: item[0]):
            residences.setdefault(key.replica_id, {})[key.model_id] = residence
        self._residences = residences
        self._held = {
            replica_id: tuple(model_id for model_id, residence in held.items() if residence.device_bytes is not None)
            for replica_id, held in residences.items()
        }

    def _index_entries(self) -> None:
        found = [entry for _, entry in sorted(self._entry_shelf.values.items())]
        self._models = {entry.model_id: entry for entry in found if isinstance(entry, ModelEntry)}
        self._loras = {entry.lora_id: entry for entry in found if isinstance(entry, LoraEntry)}
        self._guides = {entry.guide_id: entry for entry in found if isinstance(entry, GuideEntry)}


def _member_json(member: Member) -> bytes:
    rooms = {} if member.rooms is None else {"rooms": asdict(member.rooms)}
    return json.dumps({"address": member.address, "device": member.device, **rooms}).encode()


def _parse_member(key: str, value: bytes) -> Member:
    """Raises ValueError for what is no member."""
    name = keys.parse_member(key)
    try:
        fields = json.loads(value)
        address, device = fields["address"], fields.get("device", "")
        rooms = _parse_rooms(fields.get("rooms"))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{key} is no member: {error!r}") from error
    if not isinstance(address, str) or not _ADDRESS.fullmatch(address) or not isinstance(device, str):
        raise ValueError(f"{key} is no member: its address is not host:port, or its device not text")
    return Member(replica_id=name.replica_id, stage=name.stage, address=address, device=device, rooms=rooms)


def _parse_rooms(value: Any) -> Rooms | None:
    if value is None:
        return None
    return Rooms(
        device_bytes=whole(value["device_bytes"]),
        host_bytes=whole(value["host_bytes"]),
        disk_bytes=whole_or_none(value["disk_bytes"]),
        evicts=yes(value["evicts"]),
    )


def _parse_residency(key: str, value: bytes) -> tuple[keys.ResidencyKey, Residence]:
    """Raises ValueError for what is no residency."""
    return keys.parse_residency(key), Residence.from_json(value)


def _parse_entry(key: str, value: bytes) -> Entry:
    """Raises ValueError for what is no entry of the catalogue, or one under another's key."""
    entry = parse_entry(value)
    if keys.model(entry.entry_id) != key:
        raise ValueError(f"{key} holds the entry of {entry.entry_id!r}")
    return entry
