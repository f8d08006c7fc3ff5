"""How long weights take from a cold disk to tensors that can be used: Darkroom's model store, and other ways.

    pip install runai-model-streamer    # of this bench only; left out where it is missing
    python -m bench.loading --folder /a/disk/with/8/GiB

Every turn is a process of its own, the files are out of the page cache, the ways take turns, and the disk's raw
O_DIRECT bandwidth is measured among them. Imports are done before the clock starts, and the store's pool is prepared,
as it is in a stage that serves; "fresh pool" is the first load of a process that did not. Each turn ends with a look at
every page, for `from_pretrained` of one type maps the file and reads it when it is needed; "+ clone" makes it the
process's own, as Darkroom's is: a mapped file that somebody truncates ends the process. Where there is a GPU, a network
is also loaded onto it, from a pool that is pinned and from one that is not.
"""

import argparse
import gc
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch.utils._pytree import tree_leaves
from transformers import CLIPTextConfig, CLIPTextModel

from bench.report import console, finish, machine, table
from darkroom.models.store.device import pin, unpin
from darkroom.models.store.host import HostCache
from darkroom.models.store.model_store import ModelStore
from darkroom.models.store.pool import HostPool
from darkroom.models.weights import load_network, load_networks
from darkroom.policy.pinning import SizeClass
from darkroom.store.folder import Folder
from darkroom.store.indexing import write_index

_SWITCH_INTERVAL_S = 1e-4
"""As in a stage."""
_BLOCK_BYTES, _RAW_IN_FLIGHT = 2 << 20, 8
_CPU, _GPU = torch.device("cpu"), torch.device("cuda:0")
_KINDS = {"text_encoder": CLIPTextModel, "unet": UNet2DConditionModel, "vae": AutoencoderKL}
_COPIES = {
    "raw O_DIRECT": "0",
    "load_file + clone": "page cache, clone",
    "from_pretrained": "page cache, mapped",
    "from_pretrained + clone": "page cache, clone",
    "runai-model-streamer": "its own buffers",
    "Darkroom": "0",
    "Darkroom, fresh pool": "0",
    "from_pretrained, to GPU": "page cache, mapped, GPU",
    "Darkroom, to GPU": "GPU",
    "Darkroom, to GPU, not pinned": "CUDA's buffers, GPU",
}
_MODELS = ("one", "two")
Load = Callable[[], Any]
Way = Callable[[Path, str, Sequence[Path]], Load]
"""Prepares a load of something: the store, what, and its files."""


def make_store(root: Path, *, scale: int) -> None:
    """Two pipelines that share all but the UNet, by links, and a LoRA. `scale` divides widths."""
    torch.manual_seed(0)
    widths = (384 // scale, 768 // scale, 1280 // scale)
    for name in _MODELS:
        with torch.device("meta"):
            network = UNet2DConditionModel(
                block_out_channels=widths,
                down_block_types=("CrossAttnDownBlock2D",) * 2 + ("DownBlock2D",),
                up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 2,
                cross_attention_dim=768 // scale,
                layers_per_block=2,
            )
        _filled(network).save_pretrained(root / name / "unet")
    text = CLIPTextConfig(hidden_size=768 // scale, intermediate_size=3072 // scale, num_attention_heads=4)
    with torch.device("meta"):
        encoder = CLIPTextModel(text)
        vae = AutoencoderKL(
            block_out_channels=(128 // scale, 256 // scale, 512 // scale, 512 // scale),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            norm_num_groups=8,
            layers_per_block=2,
        )
    _filled(encoder).save_pretrained(root / "one" / "text_encoder")
    _filled(vae).save_pretrained(root / "one" / "vae")
    DDIMScheduler(clip_sample=False, steps_offset=1).save_pretrained(root / "one" / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
    }
    for name in _MODELS:
        (root / name / "model_index.json").write_text(json.dumps(index))
    for shared in ("text_encoder", "vae", "scheduler"):
        (root / "two" / shared).symlink_to((root / "one" / shared).resolve())
    (root / "lora").mkdir()
    rank = 32 // scale
    save_file({f"{i}.lora_A.weight": torch.randn(rank, 12_800) for i in range(64)}, root / "lora" / "lora.safetensors")
    write_index(root)


def _filled(network: Any) -> Any:
    network.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*network.parameters(), *network.buffers()):
            if tensor.is_floating_point():
                tensor.normal_(0.0, 0.02)
    return network


def cold(paths: Sequence[Path]) -> None:
    """Drops the files from the page cache."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _touch(held: Any) -> None:
    """Reads a number of every page of all tensors: some ways only promise them until then."""
    for tensor in tree_leaves(held):
        modules = tensor.components.values() if isinstance(tensor, DiffusionPipeline) else [tensor]
        for module in modules:
            own = module.parameters() if isinstance(module, torch.nn.Module) else [module]
            for each in own:
                if isinstance(each, torch.Tensor):
                    each.detach().reshape(-1)[:: 4096 // each.element_size()].sum()


def _store(root: Path, sizes: Sequence[int], *, is_pinned: bool = False) -> ModelStore:
    total = sum(sizes) + 4096 * len(sizes)
    pool = HostPool(idle_bytes=2 * total, pin=pin, unpin=unpin) if is_pinned else HostPool(idle_bytes=2 * total)
    if sizes:
        pool.prepare([SizeClass(size, float(count)) for size, count in sorted(Counter(sizes).items())], total)
    return ModelStore(Folder(root), HostCache(pool, limit_bytes=2 * total))


def _read_raw(_root: Path, _what: str, files: Sequence[Path]) -> Load:
    block = HostPool(idle_bytes=0).take(max(path.stat().st_size for path in files))

    def read() -> None:
        for path in files:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
            offsets = range(0, path.stat().st_size // 4096 * 4096, _BLOCK_BYTES)
            with ThreadPoolExecutor(_RAW_IN_FLIGHT) as threads:
                list(
                    threads.map(
                        lambda at, of=descriptor: os.preadv(of, [block.data[at : at + _BLOCK_BYTES]], at), offsets
                    )
                )
            os.close(descriptor)

    return read


def _stream(_root: Path, _what: str, files: Sequence[Path]) -> Load:
    from runai_model_streamer import SafetensorsStreamer  # noqa: PLC0415 - of this bench only, and optional

    def stream() -> Any:
        with SafetensorsStreamer() as streamer:
            streamer.stream_files([str(path) for path in files])
            return dict(streamer.get_tensors())

    return stream


def _load_usually(root: Path, what: str, _files: Sequence[Path]) -> Load:
    """As diffusers does it."""
    if what == "network":
        return partial(UNet2DConditionModel.from_pretrained, root / "one" / "unet", use_safetensors=True)
    absent: dict[str, Any] = dict.fromkeys(("tokenizer", "safety_checker", "feature_extractor"))
    return lambda: [StableDiffusionPipeline.from_pretrained(root / name, **absent) for name in _MODELS]


def _load_usually_and_clone(root: Path, what: str, files: Sequence[Path]) -> Load:
    load = _load_usually(root, what, files)

    def cloned() -> Any:
        network = load()
        for parameter in network.parameters():
            parameter.data = parameter.data.clone()
        return network

    return cloned


def _load_and_clone(_root: Path, _what: str, files: Sequence[Path]) -> Load:
    return lambda: [{name: tensor.clone() for name, tensor in load_file(path).items()} for path in files]


def _load_ours(root: Path, what: str, files: Sequence[Path], *, prepared: bool = True) -> Load:
    sizes = [path.stat().st_size for path in files] if prepared else []
    store = _store(root, sizes)
    if what == "network":
        return partial(load_network, UNet2DConditionModel, root / "one" / "unet", _CPU, store=store)
    if what == "lora":
        return lambda: [store.read(path).tensors() for path in files]
    return lambda: [_pipeline(root / name, store) for name in _MODELS]


def _load_ours_onto_gpu(root: Path, _what: str, files: Sequence[Path], *, is_pinned: bool = True) -> Load:
    store = _store(root, [path.stat().st_size for path in files], is_pinned=is_pinned)
    return partial(load_network, UNet2DConditionModel, root / "one" / "unet", _GPU, store=store)


def _load_usually_onto_gpu(root: Path, what: str, files: Sequence[Path]) -> Load:
    load = _load_usually(root, what, files)
    return lambda: load().to(_GPU)


def _pipeline(folder: Path, store: ModelStore) -> Any:
    networks = load_networks(store, {name: (kind, folder / name) for name, kind in _KINDS.items()}, _CPU)
    absent: dict[str, Any] = dict.fromkeys(("tokenizer", "safety_checker", "feature_extractor"))
    return StableDiffusionPipeline(**networks, **absent, scheduler=DDIMScheduler.from_pretrained(folder / "scheduler"))


def ways_of(what: str) -> dict[str, Way]:
    """What prepares each way to load `what`, by its name."""
    ways: dict[str, Way] = {"raw O_DIRECT": _read_raw}
    if what != "pipelines":
        ways["load_file + clone"] = _load_and_clone
    if what != "lora":
        ways["from_pretrained"] = _load_usually
    if what == "network":
        ways["from_pretrained + clone"] = _load_usually_and_clone
    if what != "pipelines" and importlib.util.find_spec("runai_model_streamer"):
        ways["runai-model-streamer"] = _stream
    ways |= {"Darkroom": _load_ours, "Darkroom, fresh pool": partial(_load_ours, prepared=False)}
    if what == "network" and torch.cuda.is_available():
        ways["from_pretrained, to GPU"] = _load_usually_onto_gpu
        ways["Darkroom, to GPU"] = _load_ours_onto_gpu
        ways["Darkroom, to GPU, not pinned"] = partial(_load_ours_onto_gpu, is_pinned=False)
    return ways


def files_of(root: Path, what: str) -> list[Path]:
    """The weights that `what` is loaded from, each once."""
    folders = {"network": ["one/unet"], "lora": ["lora"], "pipelines": ["one", "two"]}[what]
    return sorted({path.resolve() for folder in folders for path in (root / folder).rglob("*.safetensors")})


def turn(root: Path, what: str, way: str) -> None:
    """One turn, in a process of its own: prints its figures."""
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    torch.set_num_threads(1)
    files = files_of(root, what)
    load = ways_of(what)[way](root, what, files)
    if torch.cuda.is_available():
        torch.zeros(1, device=_GPU)  # or the first copy would wait for the driver
    gc.collect()
    cold(files)
    before, start_s = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    held = load()
    _touch(held)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    took_s, after = time.perf_counter() - start_s, resource.getrusage(resource.RUSAGE_SELF)
    del held
    print(
        json.dumps(
            {
                "s": took_s,
                "cpu_s": after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime,
                "page_faults": after.ru_minflt - before.ru_minflt,
            }
        )
    )


def measure(root: Path, what: str, round_count: int) -> dict[str, dict[str, float]]:
    """Medians of every way, the ways taking turns."""
    ways = list(ways_of(what))
    seen: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for _ in range(round_count):
        for way in ways:
            command = [sys.executable, "-m", "bench.loading", "--turn", what, way, "--folder", str(root.parent)]
            answer = subprocess.run(command, check=True, capture_output=True, text=True)
            seen[way].append(json.loads(answer.stdout.splitlines()[-1]))
    size_bytes = sum(path.stat().st_size for path in files_of(root, what))
    figures = {
        way: {key: statistics.median(each[key] for each in turns) for key in turns[0]} for way, turns in seen.items()
    }
    raw_s = figures["raw O_DIRECT"]["s"]
    return {
        way: {**own, "bytes_per_s": size_bytes / own["s"], "share_of_raw": raw_s / own["s"], "size_bytes": size_bytes}
        for way, own in figures.items()
    }


def show(what: str, figures: Mapping[str, Mapping[str, float]]) -> None:
    """A table of one measurement."""
    rows = [
        (
            way,
            f"{own['s']:.3f}",
            f"{own['bytes_per_s'] / 1e9:.2f}",
            f"{own['share_of_raw']:.0%}",
            f"{own['cpu_s']:.2f}",
            f"{own['page_faults']:.0f}",
            _COPIES[way],
        )
        for way, own in figures.items()
    ]
    size = next(iter(figures.values()))["size_bytes"]
    title = f"{what}: {size / 2**20:.0f} MiB, cold"
    table(title, ("way", "s", "GB/s", "of raw", "CPU s", "page faults", "copies of the bytes"), rows)


def main() -> None:
    """The bench, or one turn of it."""
    parser = argparse.ArgumentParser(prog="python -m bench.loading", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("out/bench/loading"), help="where 8 GiB have room")
    parser.add_argument("--quick", action="store_true", help="small files and one round, to see that the bench runs")
    parser.add_argument("--turn", nargs=2, metavar=("WHAT", "WAY"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.turn:
        turn(given.folder / "store", *given.turn)
        return
    on, root = machine(), given.folder / "store"
    if not (root / "lora").exists():
        root.mkdir(parents=True, exist_ok=True)
        make_store(root, scale=4 if given.quick else 1)
    figures = {what: measure(root, what, 1 if given.quick else 3) for what in ("network", "lora", "pipelines")}
    for what, own in figures.items():
        show(what, own)
        saved = 1 - own["Darkroom"]["s"] / own.get("from_pretrained", own.get("load_file + clone", {}))["s"]
        console.print(f"Darkroom saves {saved:.0%} of the usual way's time")
    finish("loading", on, figures)


if __name__ == "__main__":
    main()
