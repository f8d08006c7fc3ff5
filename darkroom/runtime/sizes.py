"""Sizes as people write them: `8GiB`, `500 MB`, or bytes."""

import re

_SIZE = re.compile(r"(-?\d+(?:\.\d+)?) ?([kmgt]?)(i?)b?", re.ASCII | re.IGNORECASE)


def parse_bytes(text: str) -> int:
    """The size in bytes; k, M, G and T are powers of 1000, with an i of 1024. Raises ValueError."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(f"must be a size such as 8GiB, not {text!r}")
    number, unit, binary = match.groups()
    factor = (1024 if binary else 1000) ** " kmgt".index(unit.lower() or " ")
    return int(number) * factor if number.lstrip("-").isdecimal() else int(float(number) * factor)
