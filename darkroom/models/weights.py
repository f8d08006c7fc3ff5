"""Loads networks by their folders: files through the store, built over their bytes, moved to the device."""

import contextlib
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import structlog
import torch

from darkroom.errors import DarkroomError
from darkroom.models.building import Unhandled, build, weights_files
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
    """Networks by name, of these classes and folders; while one is built, the files of the next are read."""
    networks: dict[str, torch.nn.Module] = {}
    names = list(wanted)
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as ahead:
        held: list[Future[list[HostFile]]] = []  # what was read stays in memory until it is asked for
        for number, (name, (kind, folder)) in enumerate(wanted.items()):

            def read_next(following: Sequence[str] = names[number + 1 : number + 2]) -> None:
                held.extend(ahead.submit(_read_ahead, store, *wanted[each]) for each in following)

            networks[name] = load_network(kind, folder, device, store=store, on_read=read_next)
            del held[:-1]
    return networks


def _read_ahead(store: ModelStore, kind: Any, folder: Path) -> list[HostFile]:
    """Whatever goes wrong is said when the files are asked for."""
    with contextlib.suppress(Unhandled, DarkroomError, *LOADING_ERRORS):
        return [store.read(path) for path in weights_files(kind, folder, store.weights(folder))[0]]
    return []


def load_network(
    kind: Any,
    folder: Path,
    device: torch.device,
    *,
    store: ModelStore | None = None,
    on_read: Callable[[], None] = lambda: None,
) -> torch.nn.Module:
    """The network with its weights, on the device, in the type it runs in there. The files are those of `store`.

    `on_read` is called when they are in memory, and the rest of the work begins.
    """
    store = store or store_of(folder.parent.parent)
    dtype = running_dtype(store, folder, device)
    read_s = time.monotonic()

    def note_read() -> None:
        nonlocal read_s
        read_s = time.monotonic()
        on_read()

    network, files = _built(kind, folder, dtype, store, note_read)
    if getattr(network.config, "force_upcast", False) and network.dtype is torch.float16:
        # pipelines would cast it to and fro around each request, under the feet of the others
        network = network.float()
    network = to_device(network.eval().requires_grad_(requires_grad=False), device)
    if files:
        size_bytes = sum(file.header.size_bytes for file in files)
        store.eviction.loaded(Tier.DEVICE, size_bytes, time.monotonic() - read_s)
    if uses(network, files):  # others that have the same files share them while this one lives
        network.__dict__["host_files"] = files
    return network


def _built(
    kind: Any, folder: Path, dtype: torch.dtype, store: ModelStore, on_read: Callable[[], None]
) -> tuple[Any, list[HostFile]]:
    """The network, on the CPU, over the bytes of files in memory where that can be done."""
    try:
        paths, is_sharded = weights_files(kind, folder, store.weights(folder))
        files = [store.read(path) for path in paths]
        on_read()
        network = build(kind, folder, merged(files), dtype, is_sharded=is_sharded)
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
