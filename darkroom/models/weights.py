"""Loads networks by their folders: files through the store, built over their bytes, moved to the device."""

import contextlib
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import structlog
import torch

from darkroom.errors import DarkroomError
from darkroom.models.building import Unhandled, prepare, weights_files
from darkroom.models.store.device import to_device
from darkroom.models.store.host import HostFile, merged, uses
from darkroom.models.store.model_store import ModelStore, store_of
from darkroom.policy.worth import Tier

_log = structlog.get_logger()
LOADING_ERRORS = (OSError, ValueError, TypeError, KeyError, RuntimeError, AttributeError)
"""What a bad folder makes the loaders raise."""
_STORED_TYPES = {"F16": torch.float16, "BF16": torch.bfloat16}


def load_networks(
    store: ModelStore, wanted: Mapping[str, tuple[Any, Path]], device: torch.device
) -> dict[str, torch.nn.Module]:
    """Networks by name, of these classes and folders; while one is made, its files and the next one's are read."""
    networks: dict[str, torch.nn.Module] = {}
    ways = list(wanted.values())
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as ahead:
        held = [ahead.submit(_read_ahead, store, *way) for way in ways[:1]]
        for number, (name, (kind, folder)) in enumerate(wanted.items()):

            def read_next(following: Sequence[tuple[Any, Path]] = ways[number + 1 : number + 2]) -> None:
                held.extend(ahead.submit(_read_ahead, store, *way) for way in following)

            networks[name] = _load_network(store, kind, folder, device, read_next)
            del held[:-1]  # what was read stays in memory until it is asked for
    return networks


def _read_ahead(store: ModelStore, kind: Any, folder: Path) -> list[HostFile]:
    """Whatever goes wrong is said when the files are asked for."""
    with contextlib.suppress(Unhandled, DarkroomError, *LOADING_ERRORS):
        return [store.read(path) for path in weights_files(kind, folder, store.weights(folder))[0]]
    return []


def load_network(kind: Any, folder: Path, device: torch.device, *, store: ModelStore | None = None) -> torch.nn.Module:
    """The network with its weights, on the device, in the type it runs in there. The files are those of `store`."""
    (network,) = load_networks(store or store_of(folder.parent.parent), {"": (kind, folder)}, device).values()
    return network


def _load_network(
    store: ModelStore, kind: Any, folder: Path, device: torch.device, on_read: Callable[[], None]
) -> torch.nn.Module:
    dtype = running_dtype(store, folder, device)
    start_s, reading_s = time.monotonic(), 0.0

    def read(paths: Sequence[Path]) -> list[HostFile]:
        nonlocal reading_s
        begin_s = time.monotonic()
        files = [store.read(path) for path in paths]
        reading_s = time.monotonic() - begin_s
        on_read()
        return files

    network, files = _built(kind, folder, dtype, store, read)
    if getattr(network.config, "force_upcast", False) and network.dtype is torch.float16:
        # pipelines would cast it to and fro around each request, under the feet of the others
        network = network.float()
    network = to_device(network.eval().requires_grad_(requires_grad=False), device)
    if files:
        size_bytes = sum(file.header.size_bytes for file in files)
        store.eviction.loaded(Tier.DEVICE, size_bytes, time.monotonic() - start_s - reading_s)
    if uses(network, files):  # others that have the same files share them while this one lives
        network.__dict__["host_files"] = files
    return network


def _built(
    kind: Any,
    folder: Path,
    dtype: torch.dtype,
    store: ModelStore,
    read: Callable[[Sequence[Path]], list[HostFile]],
) -> tuple[Any, list[HostFile]]:
    """The network, on the CPU, over the bytes of files in memory where that can be done."""
    try:
        paths, is_sharded = weights_files(kind, folder, store.weights(folder))
        filling = prepare(kind, folder, dtype, is_sharded=is_sharded)
        files = read(paths)
        network = filling(merged(files))
    except Unhandled as problem:
        _log.info("built_by_its_library", network=kind.__name__, reason=str(problem))
        for path in store.weights(folder):
            store.verify(path)
        return kind.from_pretrained(folder, dtype=dtype, use_safetensors=True, local_files_only=True), []
    return network, files


def running_dtype(store: ModelStore, folder: Path, device: torch.device) -> torch.dtype:
    """What a network runs in: single precision on a CPU, elsewhere the type of most of the numbers stored.

    Not "auto": diffusers takes that for single precision. Raises ValueError or OSError for files that are none, or
    StoreUnavailable.
    """
    if device.type == "cpu":
        return torch.float32
    counts: Counter[str] = Counter()
    for path in store.weights(folder):
        for place in store.header(path).tensors.values():
            counts[place.element_type] += math.prod(place.shape)
    return _STORED_TYPES.get(counts.most_common(1)[0][0], torch.float32) if counts else torch.float32


def files_of(store: ModelStore, kind: Any, folder: Path) -> list[Path]:
    """A network's weights files, at least one. Raises ValueError or OSError."""
    present = store.weights(folder)
    if not present:
        raise FileNotFoundError(f"{folder.name} has no weights")
    try:
        return weights_files(kind, folder, present)[0]
    except Unhandled:
        return present


def network_size(store: ModelStore, kind: Any, folder: Path, device: torch.device) -> tuple[str, int]:
    """A name for the network's files, and the bytes that it takes on the device.

    Raises ValueError, OSError or StoreUnavailable.
    """
    width, total, name = running_dtype(store, folder, device).itemsize, 0, f"{device}"
    for path in files_of(store, kind, folder):
        name += f"|{store.identity(path)}"
        for place in store.header(path).tensors.values():
            is_float = place.element_type[0] in "FB" and place.element_type != "BOOL"
            total += math.prod(place.shape) * width if is_float else place.end - place.start
    return name, total
