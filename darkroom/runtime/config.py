"""Reads a service's configuration once: flags, then `DARKROOM_*` environment, then the dataclass's default.

A config is a frozen dataclass of flat fields. An unknown flag or a malformed value stops the process with a message.
A field whose name ends in `_bytes` takes a size with a unit, too: `8GiB`.
"""

import argparse
import math
import os
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, TypeVar

from darkroom.runtime.sizes import parse_bytes

C = TypeVar("C")
_PREFIX = "DARKROOM_"


def read_config(
    kind: type[C], *, program: str, arguments: Sequence[str] | None = None, environment: Mapping[str, str] = os.environ
) -> C:
    """The configuration of this process. Exits with status 2 and a message when a value is malformed."""
    parser = argparse.ArgumentParser(prog=program, description=kind.__doc__, allow_abbrev=False)
    hints = typing.get_type_hints(kind)
    for field in fields(kind):  # type: ignore[arg-type]
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            default=None,
            metavar=_metavar(field.name, hints[field.name]),
            required=_is_required(field, environment),
        )
    given = parser.parse_args(arguments)
    values: dict[str, Any] = {}
    for field in fields(kind):  # type: ignore[arg-type]
        text = getattr(given, field.name)
        source = f"--{field.name.replace('_', '-')}"
        if text is None:
            source = _PREFIX + field.name.upper()
            text = environment.get(source)
        if text is not None:
            try:
                values[field.name] = parse_bytes(text) if _is_size(field.name) else _parse(text, hints[field.name])
            except ValueError:
                parser.error(f"{source} must be {_metavar(field.name, hints[field.name])}, not {text!r}")
    try:
        return kind(**values)
    except ValueError as error:
        print(f"{program}: {error}", file=sys.stderr)  # noqa: T201 - logging is configured after the config is read
        raise SystemExit(2) from error


def _is_required(field: "Field[Any]", environment: Mapping[str, str]) -> bool:
    has_default = field.default is not MISSING or field.default_factory is not MISSING
    return not has_default and _PREFIX + field.name.upper() not in environment


def _is_size(name: str) -> bool:
    return name.endswith("_bytes")


def _metavar(name: str, hint: Any) -> str:
    if _is_size(name):
        return "SIZE"
    if typing.get_origin(hint) is tuple:
        return "LIST"
    if typing.get_origin(hint) is typing.Literal:
        return "|".join(typing.get_args(hint))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return _metavar(name, typing.get_args(hint)[0])
    return {int: "INTEGER", float: "NUMBER", bool: "true|false", Path: "PATH"}.get(hint, "TEXT")


def _parse(text: str, hint: Any) -> Any:
    if typing.get_origin(hint) is tuple:
        return tuple(part.strip() for part in text.split(",") if part.strip())
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return _parse(text, typing.get_args(hint)[0])
    if typing.get_origin(hint) is typing.Literal:
        if text not in typing.get_args(hint):
            raise ValueError(text)
        return text
    if hint is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(text)
        return text.lower() == "true"
    if hint is float and not math.isfinite(float(text)):
        raise ValueError(text)
    return hint(text)
