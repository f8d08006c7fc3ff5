"""Parts of models from a store elsewhere: shared, verified on each load, mended once, adapters beside the base."""

import asyncio
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from darkroom.errors import ModelNotFound, StoreUnavailable, UnusableModel
from darkroom.models.loader import load_part, part_files, part_sizes
from darkroom.models.lora_file import changes_text
from darkroom.models.replica import StageReplica
from darkroom.models.store.model_store import ModelStore, model_store
from darkroom.store.folder import Folder
from darkroom.store.indexing import write_index
from darkroom.store.node import NodeStore
from darkroom.store.opening import check_store, open_source
from darkroom.store.source import Afar, Wanted
from darkroom.wire.tasks import LoraUse
from tests.tiny_models import save_tiny_model

_CPU = torch.device("cpu")
_UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Two models that differ in their VAEs only, and a LoRA."""
    root = tmp_path / "remote"
    save_tiny_model(root, "tiny-sd")
    shutil.copytree(root / "tiny-sd", root / "other")
    vae = root / "other" / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(vae).items()}, vae, metadata={"format": "pt"})
    (root / "ink").mkdir()
    save_file({"unet.x.lora_A.weight": torch.ones(2, 2)}, root / "ink" / "ink.safetensors")
    write_index(root)
    return root


def _open(files: Path, tmp_path: Path, *, host_cache_bytes: int = 0) -> ModelStore:
    source = open_source(f"file://{files}", tmp_path / "cache", 1 << 30)
    return model_store(source, device="cpu", pool_bytes=0, host_cache_bytes=host_cache_bytes)


def _weights(store: ModelStore, model_id: str, stage: str, name: str) -> dict[str, torch.Tensor]:
    return dict(load_part(store, model_id, stage, _CPU).networks[name].named_parameters())


def test_a_part_fetches_its_own_weights_only(files: Path, tmp_path: Path) -> None:
    store = _open(files, tmp_path)
    part = load_part(store, "tiny-sd", "denoiser", _CPU)
    assert [path.relative_to(store.root).as_posix() for path in store.root.rglob("*.safetensors")] == [
        f"tiny-sd/{_UNET}"
    ]
    plain = load_part(files, "tiny-sd", "denoiser", _CPU)
    for name, tensor in plain.networks["unet"].state_dict().items():
        assert torch.equal(part.networks["unet"].state_dict()[name], tensor)


def test_models_with_equal_components_share_their_memory(files: Path, tmp_path: Path) -> None:
    store = _open(files, tmp_path)
    one, other = (load_part(store, model_id, "denoiser", _CPU) for model_id in ("tiny-sd", "other"))
    for mine, its in zip(one.networks["unet"].parameters(), other.networks["unet"].parameters(), strict=True):
        assert mine.data_ptr() == its.data_ptr()


def test_a_model_that_was_dropped_comes_back_without_the_disk(files: Path, tmp_path: Path) -> None:
    store = _open(files, tmp_path, host_cache_bytes=1 << 30)
    load_part(store, "tiny-sd", "vae", _CPU)
    load_part(store, "tiny-sd", "vae", _CPU)
    assert store._host.read_count == 1


def test_what_is_read_is_known_by_the_models_that_it_was_read_for(files: Path, tmp_path: Path) -> None:
    store = _open(files, tmp_path, host_cache_bytes=1 << 30)
    for model_id in ("tiny-sd", "other"):
        load_part(store, model_id, "denoiser", _CPU)
    (shared,) = store._host._kept.values()
    assert shared.users == {"tiny-sd", "other"}
    in_place = model_store(Folder(files), device="cpu", pool_bytes=0, host_cache_bytes=1 << 30)
    load_part(in_place, "other", "denoiser", _CPU)
    (own,) = in_place._host._kept.values()
    assert own.users == {"other"}


def test_whether_a_lora_changes_the_text_is_known_before_it_is_fetched(files: Path, tmp_path: Path) -> None:
    assert not changes_text(_open(files, tmp_path), "ink")
    assert not list((tmp_path / "cache" / "objects").iterdir())
    with pytest.raises(ModelNotFound):
        changes_text(_open(files, tmp_path), "nowhere")
    save_file({"unet.x.lora_A.weight": torch.ones(2, 2), "lora_te_x": torch.ones(1)}, files / "ink" / "ink.safetensors")
    write_index(files)
    assert changes_text(_open(files, tmp_path), "ink")


def test_a_file_damaged_on_the_node_is_quarantined_and_fetched_once_more(files: Path, tmp_path: Path) -> None:
    store = _open(files, tmp_path)
    before = {name: tensor.clone() for name, tensor in _weights(store, "tiny-sd", "denoiser", "unet").items()}
    path = store.root / "tiny-sd" / _UNET
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)
    for name, tensor in _weights(store, "tiny-sd", "denoiser", "unet").items():
        assert torch.equal(tensor, before[name])
    assert len(list((tmp_path / "cache" / "quarantine").iterdir())) == 1


def test_a_file_whose_header_is_damaged_on_the_node_is_fetched_once_more(files: Path, tmp_path: Path) -> None:
    store = _open(files, tmp_path)
    store.fetch_weights("tiny-sd", "unet")
    path = store.root / "tiny-sd" / _UNET
    before = store.header(path)
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:100])
    assert store.header(path) == before
    assert [file.stat().st_size for file in (tmp_path / "cache" / "quarantine").iterdir()] == [100]


def test_a_model_with_weights_that_are_no_numbers_is_refused(files: Path, tmp_path: Path) -> None:
    path = files / "other" / _UNET
    tensors = load_file(path)
    tensors["conv_in.bias"][0] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})
    write_index(files)
    for where in (_open(files, tmp_path), files):
        with pytest.raises(UnusableModel, match="no numbers"):
            load_part(where, "other", "denoiser", _CPU)
        load_part(where, "tiny-sd", "denoiser", _CPU)


def test_an_indexed_folder_is_not_served_where_it_differs_from_its_index(files: Path) -> None:
    path = files / "other" / _UNET
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UnusableModel, match="digest"):
        load_part(files, "other", "denoiser", _CPU)
    assert path.read_bytes() == content  # somebody's folder is not touched
    load_part(files, "tiny-sd", "denoiser", _CPU)


@pytest.mark.parametrize("name", ["nowhere", "../tiny-sd", "", ".darkroom", "ink"])
def test_what_is_no_model_is_not_found(name: str, files: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound):
        load_part(_open(files, tmp_path), name, "vae", _CPU)


def test_a_store_that_was_never_read_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable):
        load_part(_open(tmp_path / "none", tmp_path), "tiny-sd", "vae", _CPU)


class _DroppedOnceFetched(NodeStore):
    """Beside a process that needs the room for something else at once."""

    def fetch(self, entry_id: str, wanted: Wanted) -> None:
        super().fetch(entry_id, wanted)
        for path in (self.root / entry_id).rglob("*.safetensors"):
            path.unlink()


class _DroppedOnceLocated(NodeStore):
    """Likewise, a little later."""

    def locate(self, path: Path) -> Path | Afar:
        found = super().locate(path)
        path.unlink(missing_ok=True)
        return found


@pytest.mark.parametrize("kind", [_DroppedOnceFetched, _DroppedOnceLocated])
def test_weights_that_are_dropped_before_they_are_read_can_be_read(
    kind: type[NodeStore], files: Path, tmp_path: Path
) -> None:
    source = kind(f"file://{files}", tmp_path / "cache", limit_bytes=1 << 30)
    store = model_store(source, device="cpu", pool_bytes=0, host_cache_bytes=0)
    assert [*part_sizes(store, "tiny-sd", "vae", _CPU).values()] == [
        *part_sizes(files, "tiny-sd", "vae", _CPU).values()
    ]
    names = ["diffusion_pytorch_model.safetensors"]
    assert [path.name for path in part_files(store, "tiny-sd", "vae") or ()] == names
    store.fetch_weights("tiny-sd", "vae")
    assert store.size_bytes(store.root / "tiny-sd" / "vae" / names[0]) > 0
    store.fetch_weights("tiny-sd", "vae")
    with pytest.raises(StoreUnavailable):  # what must be read by its path
        store.verify(store.root / "tiny-sd" / "vae" / names[0])
    plain = load_part(files, "tiny-sd", "vae", _CPU).networks["vae"].state_dict()
    for name, tensor in load_part(store, "tiny-sd", "vae", _CPU).networks["vae"].state_dict().items():
        assert torch.equal(tensor, plain[name])


def test_a_network_without_weights_has_no_size_and_its_part_no_files(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, "tiny-sdxl")
    assert len(part_files(tmp_path, "tiny-sdxl", "encoder") or ()) == 2
    (tmp_path / "tiny-sdxl" / "text_encoder_2" / "model.safetensors").unlink()
    assert part_files(tmp_path, "tiny-sdxl", "encoder") is None
    with pytest.raises(UnusableModel, match="FileNotFoundError"):
        part_sizes(tmp_path, "tiny-sdxl", "encoder", _CPU)


async def test_adapters_are_fetched_beside_the_base(files: Path, tmp_path: Path) -> None:
    store = _open(files, tmp_path, host_cache_bytes=1 << 30)
    replica = StageReplica(
        replica_id="r",
        stage="denoiser",
        model_store=store,
        device="cpu",
        max_running=8,
        max_batch_rows=8,
        thread_count=1,
    )
    await replica.part("tiny-sd", [LoraUse("ink", 1.0), LoraUse("nowhere", 1.0)])
    async with asyncio.timeout(10):
        while store._host.read_count < 2:
            await asyncio.sleep(0.01)
    assert (store.root / "ink" / "ink.safetensors").exists()
    replica.close()


@pytest.mark.parametrize(
    "where", ["ftp://host/x", "http://", "http://h/x?y=1", "s3://", "/no/such/folder", "gopher://x"]
)
def test_what_can_be_no_store_is_refused_at_the_start(where: str) -> None:
    with pytest.raises(ValueError, match="model_store"):
        check_store(where)
