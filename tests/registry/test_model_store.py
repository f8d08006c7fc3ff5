"""A model store is read as data from strangers: what can be served is listed, the rest is refused, nothing is fatal."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from darkroom.registry.catalogue import ComponentEntry, read_model_store

Json = dict[str, object]


def write(path: Path, value: object) -> Path:
    """Writes a file, bytes as they are and all else as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(value if isinstance(value, bytes) else json.dumps(value).encode())
    return path


def make_model(root: Path, name: str = "sd", *, denoiser: str = "unet", denoiser_config: Json | None = None) -> Path:
    """A folder as diffusers writes it, with weights of 100 bytes each."""
    folder = root / name
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.42.0",
        denoiser: ["diffusers", "Denoiser"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "safety_checker": [None, None],
        "requires_safety_checker": False,
    }
    write(folder / "model_index.json", index)
    write(folder / denoiser / "config.json", denoiser_config or {})
    write(folder / denoiser / "diffusion_pytorch_model.safetensors", bytes(100))
    write(folder / "vae" / "config.json", {"block_out_channels": [1, 2, 3, 4]})
    write(folder / "vae" / "diffusion_pytorch_model.safetensors", bytes(100))
    write(folder / "scheduler" / "scheduler_config.json", {"_class_name": "EulerDiscreteScheduler"})
    return folder


def reason(root: Path, name: str = "sd") -> str:
    """Why the one folder was refused."""
    listing = read_model_store(root)
    assert listing.models == ()
    assert list(listing.refused) == [name]
    return listing.refused[name]


def test_a_unet_pipeline_is_listed_with_what_its_files_say(tmp_path: Path) -> None:
    make_model(tmp_path, denoiser_config={"sample_size": 96})
    write(tmp_path / "notes.txt", b"no model")
    write(tmp_path / "other" / "weights.bin", b"neither model nor LoRA")

    listing = read_model_store(tmp_path)

    assert listing.refused == {}
    (entry,) = listing.models
    assert (entry.model_id, entry.pipeline) == ("sd", "StableDiffusionPipeline")
    config_bytes = (tmp_path / "sd" / "scheduler" / "scheduler_config.json").stat().st_size
    assert entry.components[0] == ComponentEntry(name="unet", size_bytes=100 + len('{"sample_size": 96}'))
    assert entry.components[2] == ComponentEntry(name="scheduler", size_bytes=config_bytes)
    assert [component.name for component in entry.components] == ["unet", "vae", "scheduler"]
    assert entry.schedulers[0] == "euler"
    assert "ddim" in entry.schedulers
    assert (entry.default_width_px, entry.default_height_px, entry.size_multiple_px) == (768, 768, 8)
    assert (entry.default_step_count, entry.default_guidance_scale) == (25, 5.0)


def test_a_transformer_pipeline_needs_sizes_of_twice_the_vae_factor(tmp_path: Path) -> None:
    make_model(tmp_path, denoiser="transformer", denoiser_config={"sample_size": [64, 128]})
    (entry,) = read_model_store(tmp_path).models
    assert (entry.default_width_px, entry.default_height_px, entry.size_multiple_px) == (1024, 512, 16)


@pytest.mark.parametrize("size", [None, 0, -4, True, "64", [64], [64, "64"], [1, 2, 3], 10**30, 1.5])
def test_a_size_that_says_nothing_is_512(tmp_path: Path, size: object) -> None:
    make_model(tmp_path, denoiser_config={"sample_size": size})
    (entry,) = read_model_store(tmp_path).models
    assert (entry.default_width_px, entry.default_height_px) == (512, 512)


@pytest.mark.parametrize(("size", "expected_px"), [(1, 16), (1024, 2048)])
def test_a_default_size_is_one_that_a_request_may_have(tmp_path: Path, size: int, expected_px: int) -> None:
    make_model(tmp_path, denoiser_config={"sample_size": size})
    (entry,) = read_model_store(tmp_path).models
    assert entry.default_width_px == expected_px


def test_darkroom_json_overrides_every_default(tmp_path: Path) -> None:
    overrides = {
        "default_width_px": 320,
        "default_height_px": 192,
        "size_multiple_px": 64,
        "default_step_count": 4,
        "default_guidance_scale": 0,
    }
    write(make_model(tmp_path) / "darkroom.json", overrides)
    (entry,) = read_model_store(tmp_path).models
    assert {name: getattr(entry, name) for name in overrides} == overrides


@pytest.mark.parametrize(
    "overrides",
    [
        {"steps": 4},
        {"default_step_count": 0},
        {"default_step_count": 4.0},
        {"default_step_count": True},
        {"default_step_count": "4"},
        {"default_step_count": 10**4000},
        {"default_width_px": 100_000},
        {"default_width_px": 250},
        {"default_height_px": -8},
        {"size_multiple_px": 0},
        {"size_multiple_px": 4096},
        {"max_sequence_length": 0},
        {"max_sequence_length": 5000},
        {"default_guidance_scale": -1},
        {"default_guidance_scale": 1e30},
        {"default_guidance_scale": float("nan")},
        [],
    ],
)
def test_darkroom_json_with_nonsense_refuses_the_model(tmp_path: Path, overrides: object) -> None:
    write(make_model(tmp_path) / "darkroom.json", overrides)
    assert reason(tmp_path)


@pytest.mark.parametrize("name", ["SD", "sd 1", "-sd", "a..b", "s" * 65, "sd\n", "モデル"])
def test_a_folder_whose_name_is_no_model_id_is_refused(tmp_path: Path, name: str) -> None:
    make_model(tmp_path, name)
    assert "model_id" in reason(tmp_path, name)


def test_a_folder_in_the_making_is_passed_over(tmp_path: Path) -> None:
    make_model(tmp_path, ".sd.partial")
    listing = read_model_store(tmp_path)
    assert (listing.entries, listing.refused) == ((), {})


def test_a_folder_whose_name_is_no_text_is_refused(tmp_path: Path) -> None:
    make_model(tmp_path).rename(tmp_path / os.fsdecode(b"\xff\xfe"))
    reason(tmp_path, "\ufffd\ufffd").encode()


@pytest.mark.parametrize(
    "index",
    [
        b"",
        b"{",
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"_class_name": "P", "n": ' + b"9" * 10_000 + b"}",
        b" " * (1 << 20) + b"{}",
        [],
        "text",
        {},
        {"_class_name": None},
        {"_class_name": "../x"},
        {"_class_name": "P" * 200},
        {"_class_name": "P"},
        {"_class_name": "P", "../../etc": ["a", "b"]},
        {"_class_name": "P", "vae/..": ["a", "b"]},
        {"_class_name": "P", "missing": ["a", "b"]},
        {"_class_name": "P", **{f"c{number}": ["a", "b"] for number in range(33)}},
    ],
)
def test_an_index_that_is_none_refuses_the_model(tmp_path: Path, index: object) -> None:
    write(make_model(tmp_path) / "model_index.json", index)
    assert len(reason(tmp_path)) < 400


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".CKPT", ".pth"])
def test_weights_that_are_not_safetensors_refuse_the_model(tmp_path: Path, suffix: str) -> None:
    folder = make_model(tmp_path)
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(suffix))
    assert "safetensors" in reason(tmp_path)


def test_weights_in_both_forms_are_served(tmp_path: Path) -> None:
    write(make_model(tmp_path) / "vae" / "diffusion_pytorch_model.bin", bytes(5))
    (entry,) = read_model_store(tmp_path).models
    assert entry.components[1].size_bytes > 105


def _link_model(store: Path, outside: Path) -> None:
    (store / "sd").symlink_to(make_model(outside))


def _link_index(store: Path, outside: Path) -> None:
    index = make_model(store) / "model_index.json"
    index.rename(outside / "index")
    index.symlink_to(outside / "index")


def _link_config(store: Path, outside: Path) -> None:
    config = make_model(store) / "vae" / "config.json"
    config.unlink()
    config.symlink_to(write(outside / "config", {}))


def _link_weights(store: Path, outside: Path) -> None:
    (make_model(store) / "vae" / "more.safetensors").symlink_to(write(outside / "weights", b""))


def _link_component(store: Path, outside: Path) -> None:
    vae = make_model(store) / "vae"
    vae.rename(outside / "vae")
    vae.symlink_to(outside / "vae")


def _link_in_a_loop(store: Path, outside: Path) -> None:
    del outside
    (make_model(store) / "vae" / "loop").symlink_to("loop")


def _link_to_nothing(store: Path, outside: Path) -> None:
    (make_model(store) / "vae" / "gone").symlink_to(outside / "gone")


def _put_a_pipe_among_weights(store: Path, outside: Path) -> None:
    del outside
    os.mkfifo(make_model(store) / "vae" / "pipe.safetensors")


def _put_a_pipe_for_the_index(store: Path, outside: Path) -> None:
    del outside
    index = make_model(store) / "model_index.json"
    index.unlink()
    os.mkfifo(index)


def _put_a_folder_for_the_index(store: Path, outside: Path) -> None:
    del outside
    index = make_model(store) / "model_index.json"
    index.unlink()
    index.mkdir()


@pytest.mark.parametrize(
    "spoil",
    [
        _link_model,
        _link_index,
        _link_config,
        _link_weights,
        _link_component,
        _link_in_a_loop,
        _link_to_nothing,
        _put_a_pipe_among_weights,
        _put_a_pipe_for_the_index,
        _put_a_folder_for_the_index,
    ],
)
def test_what_leads_out_of_the_store_or_is_no_file_refuses_the_model(
    tmp_path: Path, spoil: Callable[[Path, Path], None]
) -> None:
    store, outside = tmp_path / "store", tmp_path / "outside"
    store.mkdir()
    outside.mkdir()
    spoil(store, outside)
    assert reason(store)


def test_links_inside_the_store_are_followed(tmp_path: Path) -> None:
    folder = make_model(tmp_path)
    blob = write(tmp_path / "blobs" / "weights", bytes(1000))
    (folder / "unet" / "shared.safetensors").symlink_to(blob)
    (tmp_path / "alias").symlink_to(folder)
    alias, entry = read_model_store(tmp_path).models
    assert entry.components == alias.components
    assert entry.components[0].size_bytes > 1100


def test_one_model_refused_does_not_hide_the_others(tmp_path: Path) -> None:
    make_model(tmp_path, "a")
    write(make_model(tmp_path, "b") / "model_index.json", b"{")
    make_model(tmp_path, "c")
    listing = read_model_store(tmp_path)
    assert [entry.model_id for entry in listing.models] == ["a", "c"]
    assert list(listing.refused) == ["b"]


def test_a_store_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_model_store(tmp_path / "nowhere")


def test_the_registry_needs_no_torch_and_little_memory() -> None:
    modules = "membership, catalogue, etcd, memory"
    code = (
        f"from darkroom.registry import {modules}\nimport pathlib, sys\n"
        "assert not {'torch', 'diffusers', 'transformers', 'numpy'} & sys.modules.keys()\n"
        "peak = pathlib.Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0]\n"
        "assert int(peak) < 100_000, peak\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
