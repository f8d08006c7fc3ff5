"""Manifests and indexes as data from strangers, and how a folder gets its own."""

import json
from pathlib import Path
from typing import Any

import blake3
import pytest
from typer.testing import CliRunner

from darkroom.cli import app
from darkroom.store.folder import Folder
from darkroom.store.header import Malformed
from darkroom.store.indexing import write_index
from darkroom.store.manifest import INDEX_PATH, Index, Manifest, manifest_path
from tests.store.files import WEIGHTS, make_store

_DIGEST = "0" * 64
_FILE = {"size_bytes": 3, "digest": _DIGEST}


def _manifest(files: Any, **more: Any) -> bytes:
    return json.dumps({"format": 1, "files": files, **more}).encode()


def test_a_manifest_survives_its_json() -> None:
    manifest = Manifest.from_json(_manifest({"unet/config.json": _FILE, "a.safetensors": _FILE}))
    assert Manifest.from_json(manifest.to_json()) == manifest


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[" * 100_000,
        b"[]",
        b"{}",
        b'{"format":2,"files":{}}',
        _manifest([]),
        _manifest({"../x.json": _FILE}),
        _manifest({"/etc/x.json": _FILE}),
        _manifest({"a/../x.json": _FILE}),
        _manifest({"a//x.json": _FILE}),
        _manifest({"./x.json": _FILE}),
        _manifest({".hidden.json": _FILE}),
        _manifest({"a\\x.json": _FILE}),
        _manifest({"a\x00.json": _FILE}),
        _manifest({"a/b/c/d/e.json": _FILE}),
        _manifest({"a.bin": _FILE}),
        _manifest({"a.py": _FILE}),
        _manifest({"x" * 200 + ".json": _FILE}),
        _manifest({"a.json": {"size_bytes": -1, "digest": _DIGEST}}),
        _manifest({"a.json": {"size_bytes": True, "digest": _DIGEST}}),
        _manifest({"a.json": {"size_bytes": 1 << 40, "digest": _DIGEST}}),
        _manifest({"a.safetensors": {"size_bytes": 1 << 50, "digest": _DIGEST}}),
        _manifest({"a.json": {"size_bytes": 3, "digest": "../x"}}),
        _manifest({"a.json": {"size_bytes": 3}}),
        _manifest({"a.json": _FILE, "a.json/b.json": _FILE}),
        _manifest({f"{i}.json": {**_FILE, "size_bytes": 60 << 20} for i in range(9)}),
        _manifest({f"{i}.json": _FILE for i in range(2001)}),
        b" " * (5 << 20),
    ],
    ids=range(28),
)
def test_a_bad_manifest_is_refused(text: bytes) -> None:
    with pytest.raises(Malformed):
        Manifest.from_json(text)


@pytest.mark.parametrize("entry_id", ["../x", "A", "", ".darkroom", "a/b", "a..b", "x" * 65])
def test_an_index_with_a_bad_id_is_refused(entry_id: str) -> None:
    with pytest.raises(Malformed):
        Index.from_json(json.dumps({"format": 1, "entries": {entry_id: _DIGEST}}).encode())


def test_the_command_writes_an_index_that_names_every_file(tmp_path: Path) -> None:
    make_store(tmp_path, "one", "two")
    (tmp_path / "one" / "README.md").write_text("not fetched")
    answer = CliRunner().invoke(app, ["store", "index", str(tmp_path)])
    assert answer.exit_code == 0, answer.output
    index = Index.from_json((tmp_path / INDEX_PATH).read_bytes())
    assert set(index.entries) == {"one", "two"}
    text = (tmp_path / manifest_path(index.entries["one"])).read_bytes()
    assert blake3.blake3(text).hexdigest() == index.entries["one"]
    files = Manifest.from_json(text).files
    assert set(files) == {"model_index.json", f"unet/{WEIGHTS}", "unet/config.json"}
    weights = (tmp_path / "one" / "unet" / WEIGHTS).read_bytes()
    assert files[f"unet/{WEIGHTS}"].digest == blake3.blake3(weights).hexdigest()


def test_the_command_refuses_weights_that_are_none_and_leaves_the_old_index(tmp_path: Path) -> None:
    make_store(tmp_path, "one")
    write_index(tmp_path)
    old = (tmp_path / INDEX_PATH).read_bytes()
    (tmp_path / "one" / "unet" / WEIGHTS).write_bytes(b"no tensors")
    answer = CliRunner().invoke(app, ["store", "index", str(tmp_path)])
    assert answer.exit_code == 1
    assert (tmp_path / INDEX_PATH).read_bytes() == old


def test_links_are_indexed_inside_the_store_only(tmp_path: Path) -> None:
    store = tmp_path / "store"
    make_store(store, "one")
    (tmp_path / "secret.json").write_text("{}")
    (store / "two").mkdir()
    (store / "two" / "vae").symlink_to(store / "one" / "unet")
    (store / "two" / "secret.json").symlink_to(tmp_path / "secret.json")
    (store / "two" / "loop").symlink_to(store / "two")
    index = write_index(store)
    files = Manifest.from_json((store / manifest_path(index.entries["two"])).read_bytes()).files
    assert "vae/config.json" in files
    assert "secret.json" not in files


def test_a_folder_without_an_index_promises_nothing_and_with_one_its_files(tmp_path: Path) -> None:
    make_store(tmp_path, "one")
    folder, weights = Folder(tmp_path), tmp_path / "one" / "unet" / WEIGHTS
    assert folder.expected(weights) is None
    write_index(tmp_path)
    entry = folder.expected(weights)
    assert entry is not None
    assert entry.size_bytes == weights.stat().st_size
    (tmp_path / INDEX_PATH).write_bytes(b"nonsense")
    assert folder.expected(weights) is None
