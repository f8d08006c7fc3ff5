"""Checks of what stands in the registry as JSON: each returns the value, or raises TypeError. Pure."""

import math
from typing import Any


def items(value: object) -> list[Any]:
    """A list."""
    if not isinstance(value, list):
        raise TypeError(f"expected a list, not {type(value).__name__}")
    return value


def text(value: object) -> str:
    """Text."""
    if not isinstance(value, str):
        raise TypeError(f"expected text, not {type(value).__name__}")
    return value


def text_or_none(value: object) -> str | None:
    """Text, or nothing."""
    return None if value is None else text(value)


def whole(value: object) -> int:
    """A whole number from 0 on."""
    if type(value) is not int or value < 0:
        raise TypeError(f"expected a whole number from 0 on, not {value!r}")
    return value


def finite(value: object) -> float:
    """A finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TypeError(f"expected a finite number, not {value!r}")
    return float(value)


def finite_or_none(value: object) -> float | None:
    """A finite number, or nothing."""
    return None if value is None else finite(value)


def whole_or_none(value: object) -> int | None:
    """A whole number from 0 on, or nothing."""
    return None if value is None else whole(value)


def yes(value: object) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise TypeError(f"expected true or false, not {value!r}")
    return value
