"""Range checks of request fields, shared by every service. Each returns the value or raises InvalidField naming it."""

import math
import re
import secrets

from darkroom.errors import InvalidField

MAX_PROMPT_CHARACTERS = 32_000
MAX_STEPS = 1000
MAX_GUIDANCE_SCALE = 100.0
MAX_IMAGES = 10
MIN_SIZE_PX, MAX_SIZE_PX = 16, 2048
MAX_PIXELS = 10 * 1024 * 1024
"""Of all images of a request together: as PNG, at worst, they fill the largest message."""
MAX_SEED = (1 << 63) - 1
MAX_SEQUENCE_LENGTH = 4096
MAX_LORAS = 8
MAX_LORA_SCALE = 100.0
MAX_FRAMES = 512
MAX_PRIORITY = 100
MAX_TENANT_CHARACTERS = 64
MAX_NAME_CHARACTERS = 64
MAX_PARAMETERS = 32
MAX_PARAMETER_CHARACTERS = 64_000

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_MODEL_ID = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_REPLICA_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_PARAMETER_KEY = re.compile(r"[\x20-\x7e\xa1-\xff]{1,79}")


def check_request_id(value: str, field: str = "request_id") -> str:
    """The request's id; a new one if it is empty."""
    if not value:
        return secrets.token_hex(8)
    if not _REQUEST_ID.fullmatch(value):
        raise InvalidField(field, "must be 1 to 64 characters of A-Z a-z 0-9 . _ -")
    return value


def check_model_id(value: str, field: str = "model_id") -> str:
    """A well-formed model id; says nothing about whether the model exists."""
    if not value:
        raise InvalidField(field, "must not be empty")
    if not _MODEL_ID.fullmatch(value) or ".." in value:
        raise InvalidField(
            field, "must be 1 to 64 characters of a-z 0-9 . _ -, start with a letter or digit, and hold no '..'"
        )
    return value


def check_replica_id(value: str, field: str = "replica_id") -> str:
    """A well-formed id of a replica; says nothing about whether it is up."""
    if not _REPLICA_ID.fullmatch(value):
        raise InvalidField(field, "must be 1 to 128 characters of A-Z a-z 0-9 . _ -, and start with a letter or digit")
    return value


def check_prompt(value: str, field: str = "prompt") -> str:
    """A prompt that says something."""
    if not value.strip():
        raise InvalidField(field, "must not be empty")
    return _check_text(value, field)


def check_negative_prompt(value: str) -> str:
    """A negative prompt; empty means none."""
    return _check_text(value, "negative_prompt")


def _check_text(value: str, field: str) -> str:
    if len(value) > MAX_PROMPT_CHARACTERS:
        raise InvalidField(field, f"must be at most {MAX_PROMPT_CHARACTERS} characters, not {len(value)}")
    if "\0" in value:
        raise InvalidField(field, "must not hold a NUL character")
    return value


def check_count(field: str, value: int, most: int) -> int:
    """A count from 1 to `most`."""
    return check_range(field, value, 1, most)


def check_range(field: str, value: int, least: int, most: int) -> int:
    """A whole number from `least` to `most`."""
    if not least <= value <= most:
        raise InvalidField(field, f"must be {least} to {most}, not {value}")
    return value


def check_priority(value: int) -> int:
    """A class; the higher goes first."""
    return check_range("priority", value, -MAX_PRIORITY, MAX_PRIORITY)


def check_tenant(value: str) -> str:
    """A tenant's name; empty means nobody in particular."""
    if len(value) > MAX_TENANT_CHARACTERS or not value.isprintable():
        raise InvalidField("tenant", f"must be at most {MAX_TENANT_CHARACTERS} printable characters")
    return value


def check_size(width_px: int, height_px: int, multiple_px: int) -> tuple[int, int]:
    """Width and height that the model can draw and the service accepts."""
    for field, value in (("width_px", width_px), ("height_px", height_px)):
        if not MIN_SIZE_PX <= value <= MAX_SIZE_PX:
            raise InvalidField(field, f"must be {MIN_SIZE_PX} to {MAX_SIZE_PX}, not {value}")
        if value % multiple_px:
            raise InvalidField(field, f"must be a multiple of {multiple_px}, not {value}")
    return width_px, height_px


def check_pixels(width_px: int, height_px: int, image_count: int) -> None:
    """Raises InvalidField when the images of a request are too much together."""
    if width_px * height_px * image_count > MAX_PIXELS:
        most = MAX_PIXELS // (width_px * height_px)
        raise InvalidField("image_count", f"must be at most {most} at {width_px}x{height_px}, not {image_count}")


def check_guidance_scale(value: float) -> float:
    """A finite guidance scale."""
    if not math.isfinite(value) or not 0 <= value <= MAX_GUIDANCE_SCALE:
        raise InvalidField("guidance_scale", f"must be 0 to {MAX_GUIDANCE_SCALE:g}, not {value}")
    return value


def check_lora_scale(value: float, field: str) -> float:
    """A finite factor."""
    if not math.isfinite(value) or abs(value) > MAX_LORA_SCALE:
        raise InvalidField(field, f"must be {-MAX_LORA_SCALE:g} to {MAX_LORA_SCALE:g}, not {value}")
    return value


def check_step_cache_threshold(value: float) -> float:
    """A share; 0 means no step cache."""
    if not math.isfinite(value) or not 0 <= value <= 1:
        raise InvalidField("step_cache_threshold", f"must be 0 to 1, not {value}")
    return value


def check_seed(value: int, image_count: int = 1) -> int:
    """A seed whose successors, one per image, fit as well."""
    if not 0 <= value <= MAX_SEED - image_count + 1:
        raise InvalidField("seed", f"must be 0 to {MAX_SEED - image_count + 1}, not {value}")
    return value


def check_scheduler(value: str, known: tuple[str, ...]) -> str:
    """A scheduler the model can run with; empty means the model's own."""
    if value and value not in known:
        raise InvalidField("scheduler", f"{value[:64]!r} is not one of {', '.join(known)}")
    return value


def check_parameters(values: dict[str, str]) -> dict[str, str]:
    """Text chunks for an image file."""
    if len(values) > MAX_PARAMETERS:
        raise InvalidField("parameters", f"must have at most {MAX_PARAMETERS} entries, not {len(values)}")
    for key, value in values.items():
        if not _PARAMETER_KEY.fullmatch(key):
            raise InvalidField(
                "parameters", f"has a key that is not 1 to 79 printable Latin-1 characters: {key[:79]!r}"
            )
        if len(value) > MAX_PARAMETER_CHARACTERS or "\0" in value:
            raise InvalidField(
                "parameters", f"has a value over {MAX_PARAMETER_CHARACTERS} characters or with a NUL, under {key!r}"
            )
    return dict(values)
