"""Reads one LoRA for a loaded part: which modules it changes, and by which low-rank product.

The rule: every name must be that of a module that fits, and what cannot be applied is refused, never left out. The
formats (diffusers' own, PEFT's, kohya's and others) are converted by diffusers; how strong a product is applied follows
it and PEFT exactly, so that images are the same.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
    get_peft_kwargs,
)

from darkroom.models.loader import Part
from darkroom.models.lora_file import Refused, Tensors, Unfit, check_base, read_tensors, weights_file
from darkroom.models.store.model_store import ModelStore, store_of

KEPT_SCALES = 4
"""Of a LoRA with magnitudes: for how many scales its factors, each as large as a magnitude, are kept."""
_DOWN, _UP, _UP_BIAS, _MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_B.bias", ".lora_magnitude_vector"
_KOHYA_MAGNITUDE = ".dora_scale"
_FACTOR_NAMES = ((".lora_down.weight", ".lora_up.weight"), (_DOWN, _UP))
_UNSUPPORTED = {"lokr_": "LoKr", "hada_": "LoHa", "lora_controlnet": "Control-LoRA"}
_NETWORK = re.compile(r"[a-z0-9_]{1,64}")
_LAYERS = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)


@dataclass(frozen=True, slots=True, eq=False)
class Delta:
    """What a LoRA adds to one layer: `up(down(x)) * scaling(scale)`."""

    down: torch.Tensor
    """[rank, in] or, for a convolution, [rank, in, *kernel]."""
    up: torch.Tensor
    """[out, rank] or [out, rank / groups, 1, 1]."""
    up_bias: torch.Tensor | None
    """[out]."""
    alpha: float
    divisor: float
    """The rank, or its square root (rank-stabilised LoRA, arXiv:2312.03732)."""
    magnitude: torch.Tensor | None = None
    """[out] or, for a convolution, [1, out, *1]: the length that DoRA gives to each output channel's weights."""

    def scaling(self, scale: float) -> float:
        """The factor for a request's scale, in the order of operations that PEFT has."""
        return scale * self.alpha / self.divisor

    @property
    def size_bytes(self) -> int:
        """Memory held, with the factors of as many scales as are kept."""
        held = (self.down, self.up, self.up_bias, *[self.magnitude] * (1 + KEPT_SCALES))
        return sum(tensor.numel() * tensor.element_size() for tensor in held if tensor is not None)


@dataclass(frozen=True, slots=True, eq=False)
class Lora:
    """A LoRA as loaded for one part."""

    lora_id: str
    networks: Mapping[str, Mapping[str, Delta]]
    """Deltas by the network's name, then the module's; only networks that this part holds."""
    elsewhere: frozenset[str]
    """Networks that it changes too, but which another stage holds."""

    @property
    def has_magnitudes(self) -> bool:
        """Whether it is a DoRA, in any of the networks here."""
        return any(delta.magnitude is not None for deltas in self.networks.values() for delta in deltas.values())

    @property
    def size_bytes(self) -> int:
        """Memory held."""
        return sum(delta.size_bytes for deltas in self.networks.values() for delta in deltas.values())


def read_lora(part: Part, where: Path | ModelStore, lora_id: str, *, max_bytes: int) -> Lora:
    """Reads a LoRA. Raises FileNotFoundError if the store has none, Refused, Unfit, or StoreUnavailable.

    `max_bytes`: largest file that is read.
    """
    store = store_of(where)
    path = weights_file(store, lora_id)
    check_base(path.parent, part.model_id)
    tensors, metadata = read_tensors(store, path, max_bytes)
    groups, alphas = _converted(part, tensors)
    networks: dict[str, dict[str, Delta]] = {}
    elsewhere = set()
    for name, state in groups.items():
        network = part.networks.get(name)
        if network is None:
            raise Unfit(f"changes a network {name!r}, which {part.model_id} does not have")
        if next(network.parameters()).is_meta:
            elsewhere.add(name)
        else:
            networks[name] = _deltas(network, name, state, _Strength.of(name, state, alphas, metadata))
    return Lora(lora_id, networks, frozenset(elsewhere))


def _converted(part: Part, tensors: Tensors) -> tuple[dict[str, Tensors], Mapping[str, Any]]:
    """PEFT's names of each network's tensors, and the alphas by diffusers' names."""
    for name in tensors:
        for word, kind in _UNSUPPORTED.items():
            if word in name:
                raise Refused(f"is of a kind that is not supported, {kind}: it has a tensor {name}")
    columns = _magnitudes_as_factors(tensors)
    converted, alphas = _convert(part, {name: each for name, each in tensors.items() if "dora_scale" not in name})
    groups = _by_network(converted)
    for network, state in _by_network(_convert(part, columns)[0]).items() if columns else ():
        for name, column in state.items():
            if name.endswith(_UP):
                row = column.transpose(0, 1) if column.ndim > 2 else column[:, 0]  # noqa: PLR2004 - a convolution's
                if groups.setdefault(network, {}).setdefault(name.removesuffix(_UP) + _MAGNITUDE, row) is not row:
                    raise Refused(f"has two magnitudes of {network}.{name.removesuffix(_UP)}")
    return groups, alphas


def _magnitudes_as_factors(tensors: Tensors) -> Tensors:
    """Kohya's magnitudes as LoRAs of rank 1: where the rows of a second factor go to, its magnitudes go.

    Diffusers leaves magnitudes out of files with kohya's names, and cannot convert them for every model.
    """
    columns: Tensors = {}
    for name in (name for name in tensors if "dora_scale" in name):
        magnitude, module = tensors[name], name.removesuffix(_KOHYA_MAGNITUDE)
        pair = next(((down, up) for down, up in _FACTOR_NAMES if {module + down, module + up} <= tensors.keys()), None)
        if pair is None:
            raise Refused(f"has a tensor {name} for a module that has no factors")
        if magnitude.ndim < 1 or magnitude.numel() != len(magnitude):
            raise Refused(f"has a tensor {name} {list(magnitude.shape)}: not one magnitude for each output channel")
        column = magnitude.view(-1, 1) if magnitude.ndim == 1 else magnitude
        columns |= {module + pair[0]: torch.ones_like(column[:1]), module + pair[1]: column}
    return columns


def _convert(part: Part, tensors: Tensors) -> tuple[Tensors, Mapping[str, Any]]:
    """Diffusers' names, as `network.module.….weight`, and the alphas by name."""
    pipeline = type(part.pipeline)
    if not hasattr(pipeline, "lora_state_dict"):
        raise Unfit(f"cannot be used: {pipeline.__name__} takes no LoRA")
    options = {"unet_config": part.networks["unet"].config} if "unet" in part.networks else {}
    try:
        answer = pipeline.lora_state_dict(dict(tensors), return_alphas=True, **options)
    except Exception as error:  # whatever names and shapes that diffusers did not foresee make it raise
        raise Refused(f"has tensors that do not fit {pipeline.__name__}: {str(error)[:200]}") from error
    found = answer if isinstance(answer, tuple) else (answer,)
    if _row_count(found[0]) < _row_count(tensors) or _magnitude_count(found[0]) < _magnitude_count(tensors):
        raise Refused("has tensors that diffusers leaves out")
    alphas = next((value for value in found[1:] if isinstance(value, dict)), {})
    return found[0], alphas


def _row_count(tensors: Tensors) -> int:
    """Rows of all second factors together: conversions split them and copy them, but lose none that they know."""
    return sum(
        len(tensor) for name, tensor in tensors.items() if name.endswith(("up.weight", "lora_B.weight")) and tensor.ndim
    )


def _magnitude_count(tensors: Tensors) -> int:
    return sum(tensor.numel() for name, tensor in tensors.items() if _MAGNITUDE in name)


def _by_network(converted: Tensors) -> dict[str, Tensors]:
    """PEFT's names of each network's tensors, without the network's own name in front."""
    groups: dict[str, Tensors] = {}
    for key, tensor in converted.items():
        name, _, rest = key.partition(".")
        if not rest or not _NETWORK.fullmatch(name):
            raise Refused(f"has a tensor {key[:64]!r} that belongs to no network")
        groups.setdefault(name, {})[rest] = tensor
    try:
        return {name: _peft_names(name, state) for name, state in groups.items()}
    except ValueError as error:
        raise Refused(f"has names that diffusers does not know: {str(error)[:200]}") from error


def _peft_names(network: str, state: Tensors) -> Tensors:
    """As diffusers' `load_lora_adapter` and `_load_lora_into_text_encoder` do it. Raises ValueError."""
    converted: Tensors
    if network.startswith("text_encoder"):
        converted = convert_state_dict_to_peft(convert_state_dict_to_diffusers(state))
    else:
        converted = state if "lora_A" in next(iter(state)) else convert_unet_state_dict_to_peft(state)
    return {name.removesuffix(".weight") if _MAGNITUDE in name else name: each for name, each in converted.items()}


@dataclass(frozen=True, slots=True)
class _Strength:
    """How strong each module's product is: its alpha, and what it is divided by."""

    alpha: float | None
    """None: as much as the rank."""
    pattern: Mapping[str, tuple[int, float]]
    """Alphas of single modules, by the end of their names; the earliest that matches counts."""
    is_rank_stabilised: bool

    @classmethod
    def of(
        cls, network: str, state: Tensors, alphas: Mapping[str, Any], metadata: dict[str, Any] | None
    ) -> "_Strength":
        """What the alphas of a file, or its metadata, say about one of its networks."""
        prefix = f"{network}."
        own_alphas = {k.removeprefix(prefix): _number(v) for k, v in alphas.items() if k.startswith(prefix)}
        config = {k.removeprefix(prefix): v for k, v in (metadata or {}).items() if k.startswith(prefix)}
        if own_alphas and config:
            raise Refused("has both alphas and metadata, which contradict each other")
        if own_alphas:
            ranks = {name: up.shape[1] for name, up in state.items() if name.endswith(_UP) and up.ndim > 1}
            if not ranks:
                raise Refused("has alphas but no weights")
            config = get_peft_kwargs(ranks, own_alphas, state, is_unet=not network.startswith("text_encoder"))
        if config and bool(config.get("use_dora")) != any(name.endswith(_MAGNITUDE) for name in state):
            raise Refused(f"has metadata that contradict its tensors: use_dora is {bool(config.get('use_dora'))}")
        pattern = config.get("alpha_pattern") or {}
        if not isinstance(pattern, dict) or not all(isinstance(name, str) for name in pattern):
            raise Refused("has an alpha_pattern that is none")
        alpha = config.get("lora_alpha")
        return cls(
            None if alpha is None else _number(alpha),
            {name: (position, _number(value)) for position, (name, value) in enumerate(pattern.items())},
            bool(config.get("use_rslora")),
        )

    def of_module(self, module: str, rank: int) -> tuple[float, float]:
        """Alpha and divisor. PEFT matches a pattern with the end of a module's name, or with all of it after a ^."""
        parts = module.split(".")
        ends = [f"^{module}", *(".".join(parts[start:]) for start in range(len(parts)))]
        matching = [self.pattern[end] for end in ends if end in self.pattern]
        alpha = min(matching)[1] if matching else self.alpha
        return (float(rank) if alpha is None else alpha), (math.sqrt(rank) if self.is_rank_stabilised else rank)


def _number(value: object) -> float:
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise Refused(f"has an alpha that is no number: {str(value)[:64]}")
    return value


def _deltas(network: torch.nn.Module, name: str, state: Tensors, strength: _Strength) -> dict[str, Delta]:
    """The products by module, on the network's device and in its type."""
    if name.startswith("text_encoder") and not hasattr(network, "text_model"):
        state = {key.removeprefix("text_model."): value for key, value in state.items()}
    deltas = {}
    for module, product in _products(name, state):
        layer = _layer(network, name, module)
        _check_shapes(f"{name}.{module}", layer, product)
        weight, bias, magnitude = layer.weight, product.up_bias, product.magnitude
        alpha, divisor = strength.of_module(module, product.down.shape[0])
        deltas[module] = Delta(
            _own(product.down, weight),
            _own(product.up, weight),
            None if bias is None else _own(bias, weight),
            alpha,
            divisor,
            None if magnitude is None else _own(magnitude, weight),
        )
    return deltas


@dataclass(frozen=True, slots=True, eq=False)
class _Product:
    """A module's tensors, as the file has them."""

    down: torch.Tensor
    up: torch.Tensor
    up_bias: torch.Tensor | None
    magnitude: torch.Tensor | None


def _products(name: str, state: Tensors) -> Iterator[tuple[str, _Product]]:
    """Both factors of each module. Raises Refused for a tensor that is neither, or lacks the others.

    Where one module of a network has a magnitude, all do: PEFT would make the others, and diffusers cannot run them.
    """
    for key in state:
        if not key.endswith((_DOWN, _UP, _UP_BIAS, _MAGNITUDE)):
            raise Refused(f"has a tensor {name}.{key} that is no part of a LoRA")
    is_dora = any(key.endswith(_MAGNITUDE) for key in state)
    for module in dict.fromkeys(key.rsplit(".lora_", 1)[0] for key in state):
        down, up = state.get(module + _DOWN), state.get(module + _UP)
        bias, magnitude = state.get(module + _UP_BIAS), state.get(module + _MAGNITUDE)
        if magnitude is not None and down is None and up is None:
            raise Refused(f"has a tensor {name}.{module}{_MAGNITUDE} for a module that has no factors")
        if down is None or up is None:
            raise Refused(f"has only one factor of {name}.{module}")
        if is_dora and magnitude is None:
            raise Refused(f"has magnitudes (DoRA) for some modules of {name}, but none for {name}.{module}")
        if is_dora and bias is not None:
            raise Refused(f"has a tensor {name}.{module}{_UP_BIAS} beside a magnitude, which PEFT does not take")
        yield module, _Product(down, up, bias, magnitude)


def _layer(network: torch.nn.Module, name: str, module: str) -> Any:
    try:
        layer = network.get_submodule(module)
    except AttributeError as error:
        raise Unfit(f"changes {name}.{module}, which the model does not have") from error
    if type(layer) not in _LAYERS:
        raise Unfit(f"changes {name}.{module}, a {type(layer).__name__}: only linear and convolutional layers can be")
    return layer


def _check_shapes(name: str, layer: Any, product: _Product) -> None:
    """Raises Unfit unless the factors are those that PEFT makes for the layer."""
    weight, down, up, up_bias, magnitude = layer.weight, product.down, product.up, product.up_bias, product.magnitude
    rank = down.shape[0] if down.ndim else 0
    groups = getattr(layer, "groups", 1)
    is_plain = not isinstance(layer, torch.nn.Linear)
    expected_down = (rank, layer.in_channels, *layer.kernel_size) if is_plain else (rank, weight.shape[1])
    expected_up = (weight.shape[0], rank // groups, *[1] * (weight.ndim - 2))
    if rank < 1 or rank % groups or tuple(down.shape) != expected_down or tuple(up.shape) != expected_up:
        raise Unfit(
            f"does not fit {name}: factors {list(down.shape)} and {list(up.shape)} for weights {list(weight.shape)}"
        )
    if up_bias is not None and tuple(up_bias.shape) != (weight.shape[0],):
        raise Unfit(f"does not fit {name}: a bias {list(up_bias.shape)} for weights {list(weight.shape)}")
    expected_magnitude = (1, weight.shape[0], *[1] * (weight.ndim - 2)) if is_plain else (weight.shape[0],)
    if magnitude is not None and tuple(magnitude.shape) != expected_magnitude:
        raise Unfit(f"does not fit {name}: {name}{_MAGNITUDE} {list(magnitude.shape)}, not {list(expected_magnitude)}")
    if is_plain and (layer.padding_mode != "zeros" or any(step != 1 for step in layer.dilation)):
        raise Refused(f"changes {name}, a convolution with dilation or padding that PEFT has none for")


def _own(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A copy that does not hold on to the file."""
    return tensor.to(like.device, like.dtype, copy=True).contiguous()
