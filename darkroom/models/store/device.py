"""Host → device: copies beside running forwards, on a stream of their own and in pieces, from pinned memory."""

from typing import Any

import torch

from darkroom.models.store.pool import Bytes

_PIECE_BYTES = 32 << 20
"""The copies of a forward wait for one piece at most: 1 ms over PCIe 4."""


def pin(block: Bytes) -> None:
    """Registers a block of the pool with the CUDA driver. Raises RuntimeError."""
    _check(torch.cuda.cudart().cudaHostRegister(block.ctypes.data, block.nbytes, 0))


def unpin(block: Bytes) -> None:
    """Undoes `pin`, before the memory goes. Raises RuntimeError."""
    _check(torch.cuda.cudart().cudaHostUnregister(block.ctypes.data))


def _check(code: Any) -> None:
    if int(code):
        raise RuntimeError(f"CUDA error {int(code)} on pinning memory")


def to_device(network: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """Moves a network; when this returns, all of it is there. On a CPU it stays where it is."""
    if device.type != "cuda":
        return network.to(device)
    tensors = {id(tensor): tensor.detach() for tensor in (*network.parameters(), *network.buffers())}
    with torch.cuda.device(device):
        # made on the stream that will use them, which may still be using the memory for something else
        moved = {key: torch.empty_like(tensor, device=device) for key, tensor in tensors.items()}
        copying = torch.cuda.Stream(device)
        copying.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(copying):
            for key, tensor in tensors.items():
                _copy(tensor, moved[key])
        copying.synchronize()
    network._apply(lambda tensor: moved.get(id(tensor), tensor))  # noqa: SLF001 - as Module.to does it
    return network


def _copy(source: torch.Tensor, target: torch.Tensor) -> None:
    """Enqueues the copy. `target` was made like `source`, so that both have their numbers in one order."""
    if not source.is_contiguous():
        target.copy_(source, non_blocking=True)
        return
    pieces = _PIECE_BYTES // source.element_size()
    for one, other in zip(source.reshape(-1).split(pieces), target.reshape(-1).split(pieces), strict=True):
        other.copy_(one, non_blocking=True)
