"""Networks built over tensors in memory equal what `from_pretrained` makes of the folder, bit for bit."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import pytest
import torch
import transformers
from diffusers import ConfigMixin, ModelMixin
from transformers import PreTrainedModel

from darkroom.models.building import Unhandled, meta_network, prepare, weights_files
from darkroom.models.store.host import HostCache, merged
from darkroom.models.store.pool import HostPool
from darkroom.store.source import weights_in
from tests.tiny_models import TINY_MODELS

_SHAPES = Path(__file__).parents[3] / "models"


def _networks(folder: Path) -> Iterator[tuple[Any, Path]]:
    for name, entry in json.loads((folder / "model_index.json").read_text()).items():
        if isinstance(entry, list) and entry[0] in ("diffusers", "transformers"):
            kind = getattr({"diffusers": diffusers, "transformers": transformers}[entry[0]], entry[1])
            if issubclass(kind, ModelMixin | PreTrainedModel):
                yield kind, folder / name


def _both(kind: Any, folder: Path, dtype: torch.dtype) -> tuple[Any, Any, dict[str, torch.Tensor]]:
    host = HostCache(HostPool(idle_bytes=0), limit_bytes=0)
    paths, is_sharded = weights_files(kind, folder, weights_in(folder))
    tensors = dict(merged([host.read(path, None) for path in paths]))
    prepare(kind, folder, dtype, is_sharded=is_sharded)
    with nothing_constructed():  # the one that is compared is a copy
        fill = prepare(kind, folder, dtype, is_sharded=is_sharded)
    ours = fill(tensors).eval()
    theirs = kind.from_pretrained(folder, dtype=dtype, use_safetensors=True, local_files_only=True).eval()
    return ours, theirs, tensors


@contextlib.contextmanager
def nothing_constructed() -> Iterator[None]:
    """Inside, diffusers makes no network and transformers none without weights."""
    refuse = mock.Mock(side_effect=AssertionError("it is constructed anew"))
    with mock.patch.object(ConfigMixin, "from_config", refuse), mock.patch.object(PreTrainedModel, "__init__", refuse):
        yield


def _check_equal(ours: Any, theirs: Any) -> None:
    for mine, other in (
        (dict(ours.named_parameters(remove_duplicate=False)), dict(theirs.named_parameters(remove_duplicate=False))),
        (dict(ours.named_buffers(remove_duplicate=False)), dict(theirs.named_buffers(remove_duplicate=False))),
    ):
        assert list(mine) == list(other)
        for name, tensor in other.items():
            assert mine[name].dtype == tensor.dtype, name
            assert mine[name].stride() == tensor.stride(), name
            assert torch.equal(mine[name], tensor) or torch.equal(mine[name].isnan(), tensor.isnan()), name
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert len(list(ours.parameters())) == len(list(theirs.parameters()))  # ties are ties
    assert ours.training == theirs.training
    assert _config(ours) == _config(theirs)
    assert ours.name_or_path == theirs.name_or_path if isinstance(ours, PreTrainedModel) else True


def _config(network: Any) -> dict[str, Any]:
    return dict(network.config) if isinstance(network, ModelMixin) else network.config.to_dict()


@pytest.fixture(params=[*TINY_MODELS, "shapes"])
def folder(request: pytest.FixtureRequest, tiny_store: Path) -> Path:
    return (_SHAPES if request.param == "shapes" else tiny_store) / str(request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_network_is_what_its_library_makes_of_the_folder(folder: Path, dtype: torch.dtype) -> None:
    for kind, where in _networks(folder):
        ours, theirs, tensors = _both(kind, where, dtype)
        _check_equal(ours, theirs)
        stored = {tensor.data_ptr() for tensor in tensors.values() if tensor.dtype == dtype}
        copied = [
            name for name, p in ours.named_parameters() if p.dtype == dtype and stored and p.data_ptr() not in stored
        ]
        assert not copied, (kind.__name__, copied[:3])  # no second copy


def test_networks_without_weights_are_copied_whole(folder: Path) -> None:
    for kind, where in _networks(folder):
        whole = kind.from_pretrained(where, use_safetensors=True, local_files_only=True)
        meta_network(kind, where)
        with nothing_constructed():
            copied: Any = meta_network(kind, where)
        tensors, expected = copied.state_dict(keep_vars=True), whole.state_dict()
        assert {name: tensor.shape for name, tensor in tensors.items()} == {n: t.shape for n, t in expected.items()}
        assert all(tensor.is_meta for tensor in tensors.values())
        assert {type(module) for module in copied.modules()} == {type(module) for module in whole.modules()}
        assert type(copied.config) is type(whole.config)


def test_names_of_older_releases_are_understood(tiny_store: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file  # noqa: PLC0415 - of this test only

    shutil.copytree(tiny_store / "tiny-sd" / "vae", tmp_path / "vae")
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    renamed = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    state = {}
    for name, tensor in load_file(file).items():
        for new, old in renamed.items():
            name = name.replace(new, old)  # noqa: PLW2901
        state[name] = tensor
    assert any(".query." in name for name in state)
    save_file(state, file)
    ours, theirs, _ = _both(diffusers.AutoencoderKL, tmp_path / "vae", torch.float32)
    _check_equal(ours, theirs)


def test_shards_are_read(tmp_path: Path) -> None:
    network = diffusers.UNet2DConditionModel.from_pretrained(_SHAPES / "shapes" / "unet")
    network.save_pretrained(tmp_path, max_shard_size="1MB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    ours, theirs, _ = _both(diffusers.UNet2DConditionModel, tmp_path, torch.float32)
    _check_equal(ours, theirs)


def test_missing_tensors_are_left_to_the_library(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file  # noqa: PLC0415 - of this test only

    shutil.copytree(_SHAPES / "shapes" / "vae", tmp_path / "vae")
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state.pop(next(iter(state)))
    save_file(state, file)
    with pytest.raises(Unhandled):
        _both(diffusers.AutoencoderKL, tmp_path / "vae", torch.float32)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "x.bin", 3])
def test_an_index_that_names_other_files_is_refused(name: Any, tmp_path: Path) -> None:
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ValueError, match="names"):
        weights_files(diffusers.AutoencoderKL, tmp_path, weights_in(tmp_path))
