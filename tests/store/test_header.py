"""The header reader: what files it takes, and that no bytes can hurt it."""

import io
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from darkroom.store.header import MAX_HEADER_BYTES, Malformed, parse_header, read_header

_ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def _file(header: Any, data_bytes: int = 24) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(data_bytes)


def _read(content: bytes) -> Any:
    return read_header(io.BytesIO(content), len(content))


def test_a_sound_header_says_where_each_tensor_lies() -> None:
    content = _file({"__metadata__": {"format": "pt"}, "a": _ENTRY, "b": {**_ENTRY, "data_offsets": [24, 48]}}, 48)
    found = _read(content)
    assert found.metadata == {"format": "pt"}
    assert found.tensors["b"].shape == (2, 3)
    assert found.tensors["b"].end == len(content)
    assert found.tensors["a"].end == found.tensors["b"].start


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 7,
        (2**63).to_bytes(8, "little") + b"{}",
        (MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b" " * (MAX_HEADER_BYTES + 1),
        (100).to_bytes(8, "little") + b"{}",
        _file(b"[" * 100_000, 0),
        _file(b'{"a":' * 50_000, 0),
        _file(b"\xff\xfe", 0),
        _file([1], 0),
        _file({}, 0),
        _file({"a": None}),
        _file({"a": {**_ENTRY, "dtype": "F4"}}),
        _file({"a": {**_ENTRY, "dtype": ["F32"]}}),
        _file({"a": {**_ENTRY, "shape": [2, -3]}}),
        _file({"a": {**_ENTRY, "shape": [2, True]}}),
        _file({"a": {**_ENTRY, "shape": [2.0, 3]}}),
        _file({"a": {**_ENTRY, "shape": [1] * 1000 + [6]}}),
        _file({"a": {**_ENTRY, "shape": [2**62, 2**62, 2**62, 2**62, 2**62, 2**62]}}),
        _file({"a": {**_ENTRY, "shape": "23"}}),
        _file({"a": {**_ENTRY, "data_offsets": [24, 0]}}),
        _file({"a": {**_ENTRY, "data_offsets": [0, 24, 25]}}),
        _file({"a": {**_ENTRY, "data_offsets": [-24, 0]}}),
        _file({"a": {**_ENTRY, "data_offsets": [8, 32]}}, 32),
        _file({"a": _ENTRY}, 23),
        _file({"a": _ENTRY}, 25),
        _file({"a": _ENTRY, "b": {**_ENTRY, "data_offsets": [20, 44]}}, 44),
        _file({"a": _ENTRY, "b": {**_ENTRY, "data_offsets": [28, 52]}}, 52),
        _file({"a": _ENTRY, "b": _ENTRY}),
        _file(b'{"a":' + json.dumps(_ENTRY).encode() + b',"a":' + json.dumps(_ENTRY).encode() + b"}"),
        _file(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,24]}}'),
        _file({"__metadata__": {"a": 1}, "a": _ENTRY}),
        _file({"__metadata__": [], "a": _ENTRY}),
    ],
    ids=range(32),
)
def test_a_bad_file_is_refused(content: bytes) -> None:
    with pytest.raises(Malformed):
        _read(content)


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=400))
def test_any_bytes_are_read_or_refused(content: bytes) -> None:
    for tried in (content, _file(content, 0)):
        try:
            _read(tried)
        except Malformed:
            continue


_numbers = st.one_of(st.integers(-2, 40), st.integers(), st.floats(allow_nan=False), st.booleans(), st.none())
_entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "F8_E4M3", "F4", ""]),
        "shape": st.one_of(st.lists(_numbers, max_size=3), st.text(max_size=2)),
        "data_offsets": st.lists(_numbers, max_size=3),
    },
)


@settings(deadline=None, max_examples=300)
@given(st.dictionaries(st.text(max_size=3), st.one_of(_entries, _numbers), max_size=3), st.integers(0, 64))
def test_whatever_header_is_taken_fills_the_file(header: dict[str, Any], data_bytes: int) -> None:
    text = json.dumps(header).encode()
    try:
        found = parse_header(text, len(text), 8 + len(text) + data_bytes)
    except Malformed:
        return
    assert sum(place.end - place.start for place in found.tensors.values()) == data_bytes
