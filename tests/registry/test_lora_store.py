"""LoRAs of a model store are listed by their headers; what is no LoRA, or for no model of the store, is refused."""

import json
import os
from pathlib import Path

import pytest

from darkroom.registry.catalogue import LoraEntry, read_model_store
from tests.registry.test_model_store import make_model, write

Json = dict[str, object]


def header(names: list[str]) -> Json:
    """Of tensors of two numbers each, one after the other."""
    entries: Json = {"__metadata__": {"format": "pt"}}
    for i, name in enumerate(names):
        entries[name] = {"dtype": "F32", "shape": [2], "data_offsets": [8 * i, 8 * i + 8]}
    return entries


def file_of(entries: object, data_bytes: int) -> bytes:
    """A safetensors file with this header."""
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + bytes(data_bytes)


def make_lora(root: Path, name: str = "ink", *, names: list[str] | None = None) -> Path:
    """A folder with one LoRA file."""
    names = names or ["unet.a.lora_A.weight", "unet.a.lora_B.weight"]
    write(root / name / "pytorch_lora_weights.safetensors", file_of(header(names), 8 * len(names)))
    return root / name


def reason(root: Path, name: str = "ink") -> str:
    """Why the one folder was refused."""
    listing = read_model_store(root)
    assert listing.loras == ()
    assert list(listing.refused) == [name]
    return listing.refused[name]


def test_a_folder_with_one_safetensors_file_is_a_lora(tmp_path: Path) -> None:
    make_model(tmp_path)
    file = make_lora(tmp_path) / "pytorch_lora_weights.safetensors"
    make_lora(tmp_path, "chalk")
    write(tmp_path / "chalk" / "darkroom.json", {"base_model": "sd", "default_scale": -2})
    listing = read_model_store(tmp_path)
    assert [entry.model_id for entry in listing.models] == ["sd"]
    assert listing.refused == {}
    chalk, ink = listing.loras
    assert (chalk.base_model, chalk.default_scale) == ("sd", -2.0)
    assert ink == LoraEntry(
        lora_id="ink", base_model=None, default_scale=1.0, stages=("denoiser",), size_bytes=file.stat().st_size
    )


def test_a_network_of_transformers_is_passed_over(tmp_path: Path) -> None:
    write(make_lora(tmp_path, "scorer") / "config.json", {"architectures": ["EfficientNetForImageClassification"]})
    make_lora(tmp_path)
    listing = read_model_store(tmp_path)
    assert [entry.lora_id for entry in listing.loras] == ["ink"]
    assert listing.refused == {}


@pytest.mark.parametrize(
    ("names", "stages"),
    [
        (["unet.a", "text_encoder.a"], ("encoder", "denoiser")),
        (["text_encoder_2.a"], ("encoder",)),
        (["lora_unet_a", "lora_te_a"], ("encoder", "denoiser")),
        (["lora_te1_a", "lora_te2_a"], ("encoder",)),
        (["transformer.text_encoder.a"], ("denoiser",)),
    ],
)
def test_a_lora_says_which_stages_it_changes(tmp_path: Path, names: list[str], stages: tuple[str, ...]) -> None:
    make_lora(tmp_path, names=names)
    (entry,) = read_model_store(tmp_path).loras
    assert entry.stages == stages


@pytest.mark.parametrize(
    "settings",
    [
        [],
        {"base": "sd"},
        {"base_model": 1},
        {"base_model": "../sd"},
        {"base_model": "another"},
        {"default_scale": "1"},
        {"default_scale": True},
        {"default_scale": 1e9},
        {"default_scale": 10**400},
        {"default_scale": float("nan")},
    ],
)
def test_a_darkroom_json_with_nonsense_refuses_the_lora(tmp_path: Path, settings: object) -> None:
    make_model(tmp_path)
    write(make_lora(tmp_path) / "darkroom.json", settings)
    assert reason(tmp_path)


ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234567",
        (1 << 62).to_bytes(8, "little") + b"{}",
        (100).to_bytes(8, "little") + b"{}",
        file_of(b"", 8),
        file_of(b"\xff", 8),
        file_of(b"[" * 100_000, 8),
        file_of([], 8),
        file_of({}, 8),
        file_of({"__metadata__": {}}, 8),
        file_of({"a": None}, 8),
        file_of({"a": []}, 8),
        file_of({"a": {}}, 8),
        file_of({"a": ONE}, 7),
        file_of({"a": ONE}, 9),
        file_of({"a": ONE, "b": ONE}, 8),
        file_of({"a": ONE, "b": {**ONE, "data_offsets": [12, 20]}}, 20),
        file_of({"a": {**ONE, "dtype": "I64"}}, 8),
        file_of({"a": {**ONE, "dtype": ["F32"]}}, 8),
        file_of({"a": {**ONE, "shape": [3]}}, 8),
        file_of({"a": {**ONE, "shape": [-2]}}, 8),
        file_of({"a": {**ONE, "shape": [True, 2]}}, 8),
        file_of({"a": {**ONE, "shape": "2"}}, 8),
        file_of({"a": {**ONE, "shape": [10**4000, 10**4000]}}, 8),
        file_of({"a": {**ONE, "data_offsets": [0]}}, 8),
        file_of({"a": {**ONE, "data_offsets": [-8, 0]}}, 8),
        file_of({"a": {**ONE, "data_offsets": [8, 16]}}, 8),
        file_of({"a": {**ONE, "data_offsets": [0.0, 8.0]}}, 8),
    ],
)
def test_a_file_that_is_no_safetensors_refuses_the_lora(tmp_path: Path, content: bytes) -> None:
    write(tmp_path / "ink" / "weights.safetensors", content)
    assert len(reason(tmp_path)) < 400


def test_two_files_are_no_lora(tmp_path: Path) -> None:
    write(make_lora(tmp_path) / "more.safetensors", file_of(header(["a"]), 8))
    assert "one" in reason(tmp_path)


def test_a_file_that_leads_out_of_the_store_or_is_no_file_refuses_the_lora(tmp_path: Path) -> None:
    store, outside = tmp_path / "store", write(tmp_path / "outside", file_of(header(["a"]), 8))
    for name in ("link", "pipe", "folder"):
        (store / name).mkdir(parents=True)
    (store / "link" / "a.safetensors").symlink_to(outside)
    os.mkfifo(store / "pipe" / "a.safetensors")
    (store / "folder" / "a.safetensors").mkdir()
    (store / "elsewhere").symlink_to(make_lora(tmp_path, "outer"))
    listing = read_model_store(store)
    assert listing.loras == ()
    assert sorted(listing.refused) == ["elsewhere", "folder", "link", "pipe"]


def test_a_name_that_is_no_id_refuses_the_lora(tmp_path: Path) -> None:
    make_lora(tmp_path, "Ink 1")
    assert "lora_id" in reason(tmp_path, "Ink 1")
