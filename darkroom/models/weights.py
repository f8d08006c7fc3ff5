"""Loads networks by their folders: files through the store, built over their bytes, moved to the device."""

import math
import time
from collections import Counter, deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import structlog
import torch

from darkroom.models.building import Unhandled, from_library, prepare, weights_files
from darkroom.models.store.device import to_device
from darkroom.models.store.host import HostFile, merged, uses
from darkroom.models.store.model_store import ModelStore, store_of
from darkroom.policy.worth import Tier

_log = structlog.get_logger()
LOADING_ERRORS = (OSError, ValueError, TypeError, KeyError, RuntimeError, AttributeError)
"""What a bad folder makes the loaders raise."""
_READ_AT_ONCE = 2
"""Networks whose files are read, or wait to be: the one that is made, and the next one."""
_STORED_TYPES = {"F16": torch.float16, "BF16": torch.bfloat16}


def load_networks(
    store: ModelStore, wanted: Mapping[str, tuple[Any, Path]], device: torch.device
) -> dict[str, torch.nn.Module]:
    """Networks by name, of these classes and folders; while one is made, its files and then the next one's are read."""
    networks: dict[str, torch.nn.Module] = {}
    left, reading = deque(wanted.values()), deque[Future[list[HostFile]]]()
    reader = ThreadPoolExecutor(1, thread_name_prefix="reading")
    try:
        for name, (kind, folder) in wanted.items():
            while left and len(reading) < _READ_AT_ONCE:  # what was read stays in memory until it is asked for
                reading.append(reader.submit(_read, store, *left.popleft()))
            networks[name] = _load_network(store, kind, folder, device, reading.popleft())
    finally:
        reader.shutdown(cancel_futures=True)
    return networks


def load_network(kind: Any, folder: Path, device: torch.device, *, store: ModelStore | None = None) -> torch.nn.Module:
    """The network with its weights, on the device, in the type it runs in there. The files are those of `store`."""
    (network,) = load_networks(store or store_of(folder.parent.parent), {"": (kind, folder)}, device).values()
    return network


def _read(store: ModelStore, kind: Any, folder: Path) -> list[HostFile]:
    return [store.read(path) for path in weights_files(kind, folder, store.weights(folder))[0]]


def _load_network(
    store: ModelStore, kind: Any, folder: Path, device: torch.device, reading: Future[list[HostFile]]
) -> torch.nn.Module:
    """Built on the CPU, over the bytes of the files in memory where that can be done."""
    dtype = running_dtype(store, folder, device)
    start_s = prepared_s = read_s = time.monotonic()
    files: list[HostFile] = []
    try:
        fill = prepare(kind, folder, dtype, is_sharded=weights_files(kind, folder, store.weights(folder))[1])
        prepared_s = time.monotonic()
        files = reading.result()
        read_s = time.monotonic()
        network: Any = fill(merged(files))
    except Unhandled as problem:
        _log.info("built_by_its_library", network=kind.__name__, reason=str(problem))
        files = []
        for path in store.weights(folder):
            store.verify(path)
        network = from_library(kind, folder, dtype)
    if getattr(network.config, "force_upcast", False) and network.dtype is torch.float16:
        # pipelines would cast it to and fro around each request, under the feet of the others
        network = network.float()
    placed = to_device(network.eval().requires_grad_(requires_grad=False), device)
    if files:
        size_bytes = sum(file.header.size_bytes for file in files)
        store.eviction.loaded(Tier.DEVICE, size_bytes, prepared_s - start_s + time.monotonic() - read_s)
    if uses(placed, files):  # others that have the same files share them while this one lives
        placed.__dict__["host_files"] = files
    return placed


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
