"""The pictures a request starts from or is led by, as they are asked for: files and numbers, not decoded yet."""

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from darkroom.errors import InvalidField
from darkroom.v1 import control_pb2
from darkroom.wire import fields

MAX_CONTROLS = 4
MAX_CONTROL_SCALE = 10.0
MAX_IP_ADAPTERS = 4
MAX_IP_ADAPTER_SCALE = 10.0
MAX_FILE_BYTES = 20 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlUse:
    """A ControlNet as a request asks for it."""

    controlnet_id: str
    image: bytes
    """A PNG, JPEG or WebP file."""
    scale: float
    """Factor of what it adds; 1 is as trained."""
    start: float
    """Share of the steps after which it begins."""
    end: float
    """Share of the steps after which it ends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IpAdapterUse:
    """An IP-Adapter as a request asks for it."""

    adapter_id: str
    image: bytes
    """A PNG, JPEG or WebP file of any size."""
    scale: float
    """Factor of what it adds; 1 is as trained."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConditionFiles:
    """Files are PNG, JPEG or WebP; empty means none."""

    image: bytes = b""
    mask: bytes = b""
    strength: float | None = None
    """Share of the steps that are done, from the image with as much noise; None means the pipeline's default."""
    controls: tuple[ControlUse, ...] = ()
    ip_adapters: tuple[IpAdapterUse, ...] = ()

    def digests(self) -> list[object]:
        """What tells these conditions from others, as JSON."""
        return [
            _digest(self.image),
            _digest(self.mask),
            self.strength,
            [[use.controlnet_id, _digest(use.image), use.scale, use.start, use.end] for use in self.controls],
            [[use.adapter_id, _digest(use.image), use.scale] for use in self.ip_adapters],
        ]


NO_CONDITIONS = ConditionFiles()


class _Message(Protocol):
    """A message with the fields of conditions: of the denoiser, of a graph's node, or of the router."""

    image: bytes
    mask: bytes
    strength: float

    @property
    def controls(self) -> Iterable[control_pb2.Control]: ...

    @property
    def ip_adapters(self) -> Iterable[control_pb2.IpAdapter]: ...

    def HasField(self, name: str, /) -> bool: ...


def parse_conditions(message: _Message) -> ConditionFiles:
    """Raises InvalidField."""
    for field in ("image", "mask"):
        _check_file(field, getattr(message, field))
    if message.mask and not message.image:
        raise InvalidField("mask", "needs an image")
    strength = message.strength if message.HasField("strength") else None
    if strength is not None and not message.image:
        raise InvalidField("strength", "needs an image")
    if strength is not None and not (math.isfinite(strength) and 0 < strength <= 1):
        raise InvalidField("strength", f"must be above 0 to 1, not {strength}")
    return ConditionFiles(
        image=message.image,
        mask=message.mask,
        strength=strength,
        controls=_parse_controls(message.controls),
        ip_adapters=_parse_ip_adapters(message.ip_adapters),
    )


def fill(message: _Message, conditions: ConditionFiles) -> None:
    """Writes conditions into a message, where there are any."""
    if conditions.image:
        message.image = conditions.image
    if conditions.mask:
        message.mask = conditions.mask
    if conditions.strength is not None:
        message.strength = conditions.strength
    controls: list[control_pb2.Control] = message.controls  # type: ignore[assignment]
    controls.extend(
        control_pb2.Control(
            controlnet_id=use.controlnet_id, image=use.image, scale=use.scale, start=use.start, end=use.end
        )
        for use in conditions.controls
    )
    ip_adapters: list[control_pb2.IpAdapter] = message.ip_adapters  # type: ignore[assignment]
    ip_adapters.extend(
        control_pb2.IpAdapter(ip_adapter_id=use.adapter_id, image=use.image, scale=use.scale)
        for use in conditions.ip_adapters
    )


def _parse_controls(messages: Iterable[control_pb2.Control]) -> tuple[ControlUse, ...]:
    uses: list[ControlUse] = []
    for position, message in enumerate(messages):
        field = f"controls[{position}]"
        if position >= MAX_CONTROLS:
            raise InvalidField("controls", f"must be at most {MAX_CONTROLS}")
        scale = _check_use(field, message, MAX_CONTROL_SCALE)
        end = message.end if message.HasField("end") else 1.0
        if not 0 <= message.start < end <= 1:
            raise InvalidField(f"{field}.end", f"must be above start, {message.start}, and at most 1, not {end}")
        controlnet_id = fields.check_model_id(message.controlnet_id, f"{field}.controlnet_id")
        uses.append(
            ControlUse(controlnet_id=controlnet_id, image=message.image, scale=scale, start=message.start, end=end)
        )
    return tuple(uses)


def _parse_ip_adapters(messages: Iterable[control_pb2.IpAdapter]) -> tuple[IpAdapterUse, ...]:
    uses: list[IpAdapterUse] = []
    for position, message in enumerate(messages):
        field = f"ip_adapters[{position}]"
        if position >= MAX_IP_ADAPTERS:
            raise InvalidField("ip_adapters", f"must be at most {MAX_IP_ADAPTERS}")
        scale = _check_use(field, message, MAX_IP_ADAPTER_SCALE)
        adapter_id = fields.check_model_id(message.ip_adapter_id, f"{field}.ip_adapter_id")
        uses.append(IpAdapterUse(adapter_id=adapter_id, image=message.image, scale=scale))
    return tuple(uses)


def _check_use(field: str, message: control_pb2.Control | control_pb2.IpAdapter, max_scale: float) -> float:
    """The scale. Raises InvalidField unless there is a picture too."""
    if not message.image:
        raise InvalidField(f"{field}.image", "must not be empty")
    _check_file(f"{field}.image", message.image)
    scale = message.scale if message.HasField("scale") else 1.0
    if not 0 <= scale <= max_scale:
        raise InvalidField(f"{field}.scale", f"must be 0 to {max_scale:g}, not {scale}")
    return scale


def _check_file(field: str, data: bytes) -> None:
    if len(data) > MAX_FILE_BYTES:
        raise InvalidField(field, f"must be at most {MAX_FILE_BYTES} bytes, not {len(data)}")


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest() if data else ""
