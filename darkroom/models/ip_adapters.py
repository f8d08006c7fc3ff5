"""IP-Adapters (Ye et al. 2023, arXiv:2308.06721): a picture as a prompt, by attention of its own beside the text's.

diffusers builds an adapter into a denoiser. Here that is a copy of the denoiser's tree of modules over the same
parameters, which makes a part of its own: requests with the same adapters share its batches, those without run on the
part as it was, and all else (LoRAs, variants, checkpoints) takes it for a part like any other. Scales are factors of
each row, so that requests with other scales share batches too.
"""

import copy
import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection

from darkroom.errors import InvalidField, ModelNotFound, UnusableModel
from darkroom.models.adapted import tree_copied
from darkroom.models.image_encoders import NAME as ENCODER
from darkroom.models.image_encoders import ImageEncoder, load_image_encoder, load_pixel_maker
from darkroom.models.loader import Part, present
from darkroom.models.lone import OnDemand
from darkroom.models.lora_file import Refused, Tensors, Unfit, check_base, read_tensors, weights_file
from darkroom.models.remote import Send
from darkroom.models.standins import StandIn
from darkroom.models.store.model_store import ModelStore, store_of
from darkroom.models.weights import LOADING_ERRORS

_MAX_BYTES = 8 << 30
_MAX_KEPT = 8
"""Combinations of a model and its adapters that are kept at once."""
_PREFIXES = {
    "image_proj": "image_proj",
    "ip_adapter_proj_model": "image_proj",
    "ip_adapter": "ip_adapter",
    "double_blocks": "ip_adapter",
}
"""First words of tensors' names, and the part of an adapter that they belong to."""
_OTHER_WORDS = {"ip_adapter_double_stream_k_proj": "to_k_ip", "ip_adapter_double_stream_v_proj": "to_v_ip"}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kind:
    """How a family's denoisers take what an IP-Adapter makes of a picture."""

    projection: str
    """The denoiser's module that it goes through first."""
    argument: str
    """The denoiser's argument that it comes in, a dict."""
    key: str
    """Its key there."""
    takes_several: bool = True


_UNET = _Kind(projection="encoder_hid_proj", argument="added_cond_kwargs", key="image_embeds")
_JOINT = _Kind(projection="encoder_hid_proj", argument="joint_attention_kwargs", key="ip_adapter_image_embeds")
_KINDS: Mapping[str, _Kind] = {
    "StableDiffusionPipeline": _UNET,
    "StableDiffusionXLPipeline": _UNET,
    "StableDiffusion3Pipeline": replace(_JOINT, projection="image_proj", takes_several=False),
    "FluxPipeline": _JOINT,
}
"""By the family's pipeline class: all of `families.IP_ADAPTED`."""


class IpAdapters(OnDemand[tuple[str, tuple[str, ...]], Part]):
    """Parts with IP-Adapters, made when they are first asked for. Its methods are called on one event loop."""

    def __init__(self, store: Path | ModelStore, send: Send) -> None:
        """`send` calls the encoder stage."""
        super().__init__(self._make, max_count=_MAX_KEPT)
        self._store, self._send = store, send
        self._plain: dict[str, Part] = {}

    async def adapted(self, part: Part, adapter_ids: Sequence[str]) -> Part:
        """The part with these adapters, in this order. Raises ModelNotFound, UnusableModel or InvalidField."""
        if not adapter_ids:
            return part
        if self._plain.get(part.model_id) is not part:
            self.forget_model(part.model_id)
            self._plain[part.model_id] = part
        return await self.get((part.model_id, tuple(adapter_ids)))

    def forget_model(self, model_id: str) -> None:
        """Lets go of a model's part and of all that was made of it."""
        self._plain.pop(model_id, None)
        self.forget(lambda key: key[0] == model_id)

    def _model_ids(self, key: tuple[str, tuple[str, ...]]) -> tuple[str, ...]:
        return (key[0], *key[1])

    def _make(self, key: tuple[str, tuple[str, ...]]) -> Part:
        model_id, adapter_ids = key
        return with_ip_adapters(self._plain[model_id], self._store, adapter_ids, self._send)


def with_ip_adapters(part: Part, where: Path | ModelStore, adapter_ids: Sequence[str], send: Send) -> Part:
    """A part like this one, whose denoiser has these adapters too: at least one.

    Raises ModelNotFound, UnusableModel, StoreUnavailable, or InvalidField for adapters of other models.
    """
    store = store_of(where)
    kind = _KINDS.get(part.family.pipeline)
    if kind is None:
        raise InvalidField("ip_adapters", f"cannot be used with this model, a {part.family.pipeline}")
    if len(adapter_ids) > 1 and not kind.takes_several:
        raise InvalidField("ip_adapters", f"must be one at most with this model, not {len(adapter_ids)}")
    for position, adapter_id in enumerate(adapter_ids):
        if (first := adapter_ids.index(adapter_id)) < position:
            raise InvalidField(f"ip_adapters[{position}].ip_adapter_id", f"repeats ip_adapters[{first}]")
    states = [_read(part, store, position, adapter_id) for position, adapter_id in enumerate(adapter_ids)]
    _check_encoders(store, adapter_ids)
    encoder = load_image_encoder(store, adapter_ids[0], part.device, send=send, dtype=part.denoiser.dtype)
    name = part.denoiser_names[0]
    tree = _adapted(part.networks[name], kind, states)
    _check_projections(getattr(tree, kind.projection).projection, encoder.network, adapter_ids)
    pipeline = copy.copy(part.pipeline)
    components = {
        name: present(name, tree, part.family),
        ENCODER: encoder.face,
        "feature_extractor": load_pixel_maker(store.root, adapter_ids[0], encoder.network),
    }
    for component, value in components.items():
        object.__setattr__(pipeline, component, value)  # not by the pipeline's own way, which writes into its config
    return replace(part, pipeline=pipeline, networks={**part.networks, name: tree})


def _read(part: Part, store: ModelStore, position: int, adapter_id: str) -> dict[str, Tensors]:
    """The adapter's tensors as diffusers takes them."""
    try:
        path = weights_file(store, adapter_id)
        check_base(path.parent, part.model_id)
        tensors, _ = read_tensors(store, path, _MAX_BYTES)
        return _sorted(tensors)
    except FileNotFoundError as error:
        raise ModelNotFound(adapter_id) from error
    except Unfit as error:
        raise InvalidField(f"ip_adapters[{position}]", f"({adapter_id}) {error}") from error
    except Refused as error:
        raise UnusableModel(adapter_id, f"it {error}") from error


def _sorted(tensors: Tensors) -> dict[str, Tensors]:
    """Raises Refused."""
    state: dict[str, Tensors] = {"image_proj": {}, "ip_adapter": {}}
    for name, tensor in tensors.items():
        first, _, rest = name.partition(".")
        if first not in _PREFIXES:
            raise Refused(f"has a tensor {name} that is no part of an IP-Adapter")
        for word, other in _OTHER_WORDS.items():
            rest = rest.replace(word, other)
        state[_PREFIXES[first]][rest.replace("processor.", "")] = tensor
    if not state["image_proj"] or not state["ip_adapter"]:
        raise Refused("is no IP-Adapter: it lacks image_proj or ip_adapter tensors")
    words = state["image_proj"]
    is_of_faces = "perceiver_resampler.proj_in.weight" in words or {"proj.0.weight", "norm.weight"} <= words.keys()
    if is_of_faces or any("lora" in name for name in state["ip_adapter"]):
        raise Refused("is a FaceID adapter, which reads embeddings of faces and not pictures")
    return state


def _check_encoders(store: ModelStore, adapter_ids: Sequence[str]) -> None:
    """Pipelines have one image encoder. Raises InvalidField unless all adapters have the same one."""
    if len(adapter_ids) == 1:
        return
    for adapter_id in adapter_ids:
        store.fetch_configs(adapter_id)
        store.fetch_weights(adapter_id, ENCODER)
    folders = [(store.root / adapter_id / ENCODER).resolve() for adapter_id in adapter_ids]
    for position, folder in enumerate(folders):
        if folder != folders[0] and _digests(store, folder) != _digests(store, folders[0]):
            problem = f"({adapter_ids[position]}) has another image encoder than the first"
            raise InvalidField(f"ip_adapters[{position}]", problem)


def _digests(store: ModelStore, folder: Path) -> list[str]:
    """Of weights and configs."""
    files = sorted((*store.weights(folder), *folder.glob("*.json")))
    return [store.promised(path) or _digest(path, path.stat().st_mtime_ns) for path in files]


@functools.lru_cache(maxsize=256)
def _digest(path: Path, _changed_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def _check_projections(projection: Any, encoder: ImageEncoder, adapter_ids: Sequence[str]) -> None:
    """Raises UnusableModel unless each adapter takes what its image encoder, on the meta device, gives."""
    several = isinstance(projection, MultiIPAdapterImageProjection)
    first = next(projection.parameters())
    size_px = encoder.network.config.image_size
    pixels = torch.empty(1, 3, size_px, size_px, device="meta", dtype=encoder.dtype)
    for adapter_id, layer in zip(
        adapter_ids, projection.image_projection_layers if several else [projection], strict=True
    ):
        try:
            features = encoder(pixels, output_hidden_states=not isinstance(layer, ImageProjection))
            found = features.image_embeds if features.hidden_states is None else features.hidden_states[-2]
            timestep = [] if several else [torch.zeros(1, device=first.device)]
            layer(torch.zeros(found.shape, device=first.device, dtype=first.dtype), *timestep)
        except torch.OutOfMemoryError:
            raise
        except LOADING_ERRORS as error:
            raise UnusableModel(adapter_id, "it does not fit its own image encoder") from error


def _adapted(network: torch.nn.Module, kind: _Kind, states: list[dict[str, Tensors]]) -> Any:
    """A copy of the network with the adapters in it, over the same parameters."""
    first = next(network.parameters())
    tree: Any = tree_copied(network)
    tree.__dict__["to"] = lambda *_, **__: tree  # diffusers would cast parameters that others are running on
    try:
        tree._load_ip_adapter_weights(states if kind.takes_several else states[0], low_cpu_mem_usage=False)  # noqa: SLF001 - the only way
    except torch.OutOfMemoryError:
        raise
    except (*LOADING_ERRORS, IndexError, AssertionError) as error:
        raise InvalidField("ip_adapters", f"do not fit this model: {str(error)[:200]}") from error
    finally:
        del tree.__dict__["to"]
    projection = ScaledProjection(getattr(tree, kind.projection).to(first.device, first.dtype).eval())
    setattr(tree, kind.projection, projection)
    for processor in tree.attn_processors.values():
        if isinstance(processor, torch.nn.Module) and hasattr(processor, "scale"):
            processor.to(first.device, first.dtype)
            scales = [RowScale(projection.rows, position) for position in range(len(states))]
            vars(processor)["scale"] = scales if kind.takes_several else scales[0]
    return tree.requires_grad_(requires_grad=False)


class _Rows:
    """The scales of the rows of the batch that runs now; empty in a copy of the denoiser that holds it."""

    def __init__(self) -> None:
        self.scales_BA = torch.ones(0, 0)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copied = type(self)()
        memo[id(self)] = copied
        return copied


class ScaledProjection(torch.nn.Module):
    """An adapter's projection of image embeddings, which finds behind them the scales of the batch's rows."""

    def __init__(self, projection: torch.nn.Module) -> None:
        """`projection` is what diffusers made."""
        super().__init__()
        self.projection = projection
        self.rows = _Rows()

    def __getattr__(self, name: str) -> Any:
        """The projection's own attribute: pipelines ask how many adapters there are, and of which class."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("projection"), name)

    def forward(self, embeds: list[torch.Tensor], *args: Any) -> Any:
        """What the projection makes of all but the last of `embeds`, which are the scales."""
        *own, self.rows.scales_BA = embeds
        is_list = not args  # with a timestep, it is a projection of one picture
        return self.projection(own if is_list else own[0], *args)


class RowScale:
    """Stands for the scale in an attention processor: multiplied with a tensor, each row has a factor of its own."""

    def __init__(self, rows: _Rows, position: int) -> None:
        """`position`: the adapter's place among those of the denoiser."""
        self._rows, self._position = rows, position

    def __mul__(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` [B, ...] times the scales, in its own type."""
        factors = self._rows.scales_BA[:, self._position].reshape(-1, *[1] * (tensor.ndim - 1))
        return (tensor * factors).to(tensor.dtype)

    __rmul__ = __mul__

    def __eq__(self, other: object) -> bool:
        """Never 0, which would leave the adapter out for all rows."""
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def __gt__(self, other: object) -> bool:
        """Above 0: pipelines ask whether there is anything to add."""
        return True


class WithScales(StandIn):
    """A denoiser with IP-Adapters as one request sees it: its calls carry the request's scales."""

    def __init__(self, network: torch.nn.Module, part: Part, scales: Sequence[float]) -> None:
        """`network` is what stands in the pipeline of `part` otherwise."""
        super().__init__(network)
        kind = _KINDS[part.family.pipeline]
        self.__dict__.update(kind=kind, scales=torch.tensor([list(scales)], device=part.device))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The network's answer."""
        own = self.__dict__
        kind: _Kind = own["kind"]
        given = dict(kwargs[kind.argument])
        embeds = given[kind.key]
        embeds = list(embeds) if kind.takes_several else [embeds]
        given[kind.key] = [*embeds, own["scales"].expand(len(embeds[0]), -1)]
        return own["network"](*args, **{**kwargs, kind.argument: given})
