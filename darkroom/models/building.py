"""Builds a network over tensors that are in memory already: what `from_pretrained` makes of a folder, bit for bit.

The rule: what is not understood is not attempted. `Unhandled` says why, and the folder is left to `from_pretrained`.
"""

import functools
import hashlib
import json
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from darkroom.models.blueprints import Blueprints

_MAX_INDEX_BYTES = 16 << 20
_DIFFUSERS_NAME, _TRANSFORMERS_NAME = "diffusion_pytorch_model.safetensors", "model.safetensors"
_blueprints = Blueprints()
_making = threading.Lock()
"""Both libraries set the process's default type, and more, while they make a network."""


class Unhandled(Exception):
    """A network that cannot be built over tensors. The message says why."""


def weights_files(kind: type, folder: Path, present: Collection[Path]) -> tuple[list[Path], bool]:
    """The files that `from_pretrained` would read, and whether they are shards. Raises Unhandled, ValueError, OSError.

    `present`: weights in the folder. diffusers looks for shards first, transformers for one file.
    """
    is_transformers = issubclass(kind, PreTrainedModel)
    whole = folder / (_TRANSFORMERS_NAME if is_transformers else _DIFFUSERS_NAME)
    index = whole.with_name(f"{whole.name}.index.json")
    if whole in present and (is_transformers or not index.is_file()):
        return [whole], False
    if not index.is_file():
        raise Unhandled(f"it has no {whole.name}")
    with index.open("rb") as file:
        found = json.loads(file.read(_MAX_INDEX_BYTES))
    names = set(found["weight_map"].values())
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{index.name} names {str(name)[:64]!r}")
    return [folder / name for name in sorted(names)], True


Fill = Callable[[Mapping[str, torch.Tensor]], torch.nn.Module]
"""Gives a network these tensors as its parameters: the very same ones where their type is the one it runs in.

Raises Unhandled, or what `from_pretrained` raises for tensors that do not fit.
"""


def prepare(kind: Any, folder: Path, dtype: torch.dtype, *, is_sharded: bool) -> Fill:
    """Does what can be done of building a network before its tensors are there.

    Raises Unhandled, or what `from_pretrained` raises for a config that is none.
    """
    if issubclass(kind, PreTrainedModel):
        config = kind.config_class.from_pretrained(folder, local_files_only=True)
        if getattr(config, "quantization_config", None) is not None:
            raise Unhandled("it is quantized")
        return functools.partial(_fill_transformers, kind, config, folder, dtype)
    return functools.partial(
        _fill_diffusers, _without_weights(kind, folder, dtype), folder, dtype, is_sharded=is_sharded
    )


def from_library(kind: Any, folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    """What `from_pretrained` makes of a folder."""
    with _making:
        network = kind.from_pretrained(folder, dtype=dtype, use_safetensors=True, local_files_only=True)
    assert isinstance(network, torch.nn.Module)
    return network


def meta_network(kind: Any, folder: Path) -> torch.nn.Module:
    """The network without weights, on the meta device."""

    def make() -> Any:
        with _making, torch.device("meta"):
            if issubclass(kind, PreTrainedModel):
                return kind(kind.config_class.from_pretrained(folder, local_files_only=True))
            return kind.from_config(kind.load_config(folder, local_files_only=True))

    return _blueprints.network((kind, _config_digest(folder), "meta"), make)


def _config_digest(folder: Path) -> bytes:
    return hashlib.blake2b((folder / "config.json").read_bytes(), digest_size=16).digest()


def _fill_transformers(
    kind: Any, config: Any, folder: Path, dtype: torch.dtype, tensors: Mapping[str, torch.Tensor]
) -> torch.nn.Module:
    """By transformers itself, which knows its renamings, ties and types, and takes tensors instead of files."""
    with _making:
        network = kind.from_pretrained(None, config=config, state_dict=dict(tensors), dtype=dtype)
    network.name_or_path = network.config.name_or_path = str(folder)
    assert isinstance(network, torch.nn.Module)
    return network


def _without_weights(kind: Any, folder: Path, dtype: torch.dtype) -> Any:
    """A network of diffusers without weights, and with the tables that it computes for itself."""

    def make() -> Any:
        config = kind.load_config(folder, local_files_only=True)
        if config.get("quantization_config") is not None:
            raise Unhandled("it is quantized")
        with _making, _Unfilled():
            usual = torch.get_default_dtype()
            torch.set_default_dtype(dtype)  # as from_pretrained does: buffers are made in it
            try:
                return kind.from_config(config)
            except (NotImplementedError, RuntimeError) as error:
                raise Unhandled(f"it cannot be made without memory: {str(error)[:100]}") from error
            finally:
                torch.set_default_dtype(usual)

    return _blueprints.network((kind, _config_digest(folder), dtype), make)


def _fill_diffusers(
    network: Any, folder: Path, dtype: torch.dtype, tensors: Mapping[str, torch.Tensor], *, is_sharded: bool
) -> torch.nn.Module:
    state, kind = dict(tensors), type(network)
    if not is_sharded:  # as from_pretrained does
        network._fix_state_dict_keys_on_load(state)  # noqa: SLF001 - names of older releases
    wanted = network.state_dict()
    if missing := wanted.keys() - state.keys():
        raise Unhandled(f"{len(missing)} tensors are not in its files, such as {min(missing)}")
    single = set(kind._keep_in_fp32_modules or ())  # noqa: SLF001 - what the class says of itself
    for name in wanted.keys() & state.keys():
        if state[name].shape != wanted[name].shape:
            raise ValueError(f"{name} has shape {tuple(state[name].shape)}, not {tuple(wanted[name].shape)}")
        _assign(network, name, _typed(state[name], torch.float32 if single & set(name.split(".")) else dtype))
    if any(tensor.is_meta for tensor in (*network.parameters(), *network.buffers())):
        raise Unhandled("it computes with values that it does not set when it is made")
    network.register_to_config(_name_or_path=folder)
    assert isinstance(network, torch.nn.Module)
    return network


def _typed(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _assign(network: torch.nn.Module, name: str, tensor: torch.Tensor) -> None:
    path, _, own = name.rpartition(".")
    module = network.get_submodule(path)
    if own in module._parameters:  # noqa: SLF001 - setattr would refuse a tensor, or note it twice
        module._parameters[own] = torch.nn.Parameter(tensor, requires_grad=False)  # noqa: SLF001
    else:
        module._buffers[own] = tensor  # noqa: SLF001


class _Unfilled(TorchFunctionMode):
    """Inside, on this thread, `torch.empty` gives tensors without memory; all that has values is made as always.

    Parameters that are to be filled cost nothing then, and tables that a network computes for itself are right.
    """

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Calls the function."""
        del types
        kwargs = dict(kwargs or {})
        if function is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return function(*args, **kwargs)
