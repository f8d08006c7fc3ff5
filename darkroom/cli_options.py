"""Options of the `darkroom` command whose text means more than itself: sizes, ids with scales, files of pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from darkroom.policy.fusion import MOST_PAIRS
from darkroom.runtime.sizes import parse_bytes
from darkroom.store.evicting import EvictionKind
from darkroom.wire.conditions import ConditionFiles, ControlUse, IpAdapterUse

_MAX_SIZE_PX = 1 << 30  # the router knows the limit; a message holds no more


def _size(text: str) -> int:
    try:
        size_bytes = parse_bytes(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    return size_bytes


def _bound(help_text: str) -> Any:
    return typer.Option(parser=_size, metavar="SIZE", help=help_text, rich_help_panel=_TIERS)


_TIERS = "What each stage keeps; docs/model-store.md has the defaults"
DeviceBudget = Annotated[int | None, _bound("Weights on its device at once; 0 for no bound.")]
HostCache = Annotated[int | None, _bound("Weights kept in memory after their models left the device.")]
Pool = Annotated[int | None, _bound("Memory made ready at the start to read weights into.")]
StoreCacheSize = Annotated[int | None, _bound("Bound of --store-cache.")]
StoreCache = Annotated[
    Path | None, typer.Option(help="Folder for what comes from a store's URL.", rich_help_panel=_TIERS)
]
MergedPairs = Annotated[
    int | None,
    typer.Option(
        min=0, max=MOST_PAIRS, help="Models kept with LoRAs merged, at most, by each denoiser.", rich_help_panel=_TIERS
    ),
]
EvictionOption = Annotated[EvictionKind | None, typer.Option(help="What leaves first.", rich_help_panel=_TIERS)]

HourPrefetch = Annotated[
    bool | None,
    typer.Option(
        "--hour-prefetch/--no-hour-prefetch",
        help="Whether the cache manager brings models near by the hour of the day. Default: no.",
        rich_help_panel=_TIERS,
    ),
]


class UsageError(Exception):
    """The command cannot be carried out as it was given; the message says why."""

    def __init__(self, message: str, code: int = 2) -> None:
        super().__init__(message)
        self.code = code


def default_store() -> Path:
    """`models` here if there is one, else the one of the source tree that this package was installed from."""
    here = Path("models")
    return here if here.is_dir() else Path(__file__).resolve().parent.parent / "models"


def parse_size(text: str) -> tuple[int, int] | tuple[None, None]:
    """Width and height in pixels. Raises UsageError."""
    if not text:
        return None, None
    width, x, height = text.lower().partition("x")
    if not (x and width.isdecimal() and height.isdecimal()):
        raise UsageError(f"--size must be WIDTHxHEIGHT, for example 64x64, not {text!r}")
    return min(int(width), _MAX_SIZE_PX), min(int(height), _MAX_SIZE_PX)


def parse_scaled(option: str, text: str) -> tuple[str, float | None]:
    """An id, and a scale if there is one. Raises UsageError naming the option."""
    name, colon, scale = text.partition(":")
    try:
        return name, float(scale) if colon else None
    except ValueError:
        raise UsageError(f"{option} must be ID or ID:SCALE, for example ink:0.8, not {text!r}") from None


def read_conditions(
    *,
    image: Path | None,
    mask: Path | None,
    strength: float | None,
    controls: Sequence[str],
    ip_adapters: Sequence[str],
) -> ConditionFiles:
    """The pictures that options name; `controls` and `ip_adapters` as ID=FILE or ID:SCALE=FILE. Raises UsageError."""
    return ConditionFiles(
        image=_read_picture("--image", image),
        mask=_read_picture("--mask", mask),
        strength=strength,
        controls=tuple(
            ControlUse(controlnet_id=guide_id, image=picture, scale=scale, start=0.0, end=1.0)
            for guide_id, scale, picture in (_parse_guide("--control", text) for text in controls)
        ),
        ip_adapters=tuple(
            IpAdapterUse(adapter_id=guide_id, image=picture, scale=scale)
            for guide_id, scale, picture in (_parse_guide("--ip-adapter", text) for text in ip_adapters)
        ),
    )


def _parse_guide(option: str, text: str) -> tuple[str, float, bytes]:
    """Id, scale and picture of a ControlNet or IP-Adapter."""
    name, equals, path = text.partition("=")
    if not equals:
        raise UsageError(f"{option} must be ID=FILE or ID:SCALE=FILE, not {text!r}")
    guide_id, scale = parse_scaled(option, name)
    return guide_id, 1.0 if scale is None else scale, _read_picture(option, Path(path))


def _read_picture(option: str, path: Path | None) -> bytes:
    if path is None:
        return b""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"{option}: {path} cannot be read: {error.strerror}") from None
