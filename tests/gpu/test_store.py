"""The store on a GPU: pinned blocks, copies beside forwards, and the same numbers as on the CPU."""

import gc
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from darkroom.models.loader import load_part
from darkroom.models.store.device import to_device
from darkroom.models.store.model_store import model_store
from darkroom.store.folder import Folder

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
_CUDA = torch.device("cuda:0")


class _Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.big = torch.nn.Parameter(torch.randn(5000, 5000), requires_grad=False)
        self.same = self.big
        self.turned = torch.nn.Parameter(torch.randn(30, 40).t(), requires_grad=False)
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("none", torch.zeros(0, 2))


def test_a_network_moves_whole_and_ties_stay_ties() -> None:
    network = _Tied()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    to_device(network, _CUDA)
    for name, tensor in network.state_dict().items():
        assert tensor.device == _CUDA
        assert torch.equal(tensor.cpu(), before[name])
    assert network.big is network.same


def test_blocks_are_pinned_and_unpinned(tmp_path: Path) -> None:
    save_file({"a": torch.randn(1 << 20)}, tmp_path / "a.safetensors")
    store = model_store(Folder(tmp_path), device="cuda:0", pool_bytes=8 << 20, host_cache_bytes=0)
    tensor = store.read(tmp_path / "a.safetensors").tensors()["a"]
    assert tensor.is_pinned()
    assert torch.equal(tensor.to(_CUDA, non_blocking=True).cpu(), tensor)
    del tensor, store
    gc.collect()
    torch.cuda.synchronize()


def test_a_part_is_the_same_from_the_disk_and_from_memory(tiny_store: Path) -> None:
    store = model_store(Folder(tiny_store), device="cuda:0", pool_bytes=0, host_cache_bytes=1 << 30)
    first = load_part(store, "tiny-sd", "denoiser", _CUDA).networks["unet"].state_dict()
    again = load_part(store, "tiny-sd", "denoiser", _CUDA).networks["unet"].state_dict()
    assert all(tensor.device == _CUDA and torch.equal(tensor, again[name]) for name, tensor in first.items())


def test_forwards_go_on_while_a_model_is_copied(tiny_store: Path) -> None:
    store = model_store(Folder(tiny_store), device="cuda:0", pool_bytes=0, host_cache_bytes=1 << 30)
    matrix = torch.randn(2048, 2048, device=_CUDA)
    wanted = (matrix @ matrix).clone()
    results = [matrix @ matrix for _ in range(50)]
    load_part(store, "tiny-sd", "denoiser", _CUDA)
    results += [matrix @ matrix for _ in range(50)]
    assert all(torch.equal(result, wanted) for result in results)
