"""Tensors on the wire: what round-trips, and what is refused."""

from typing import cast

import pytest
from google.protobuf.message import DecodeError
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given
from hypothesis import strategies as st

from darkroom.errors import InvalidTensor
from darkroom.v1 import tensor_pb2
from darkroom.wire.tensors import (
    RawTensor,
    RemoteTensor,
    digest_of,
    parse_tensor,
    ref_message,
    tensor_message,
    value_message,
)

WIDTHS = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "uint8": 1}
FLOAT32 = tensor_pb2.ELEMENT_TYPE_FLOAT32
DIGEST = digest_of(b"")
HOLDER = "127.0.0.1:7"
ELEMENT_TYPES = st.integers(-(1 << 31), (1 << 31) - 1) | st.integers(0, 6)
SHAPES = st.lists(st.integers(-(1 << 63), (1 << 63) - 1) | st.integers(0, 4), max_size=10)
DIGESTS = st.text(max_size=70) | st.just(DIGEST)
SECONDS = st.integers(-(1 << 63), (1 << 63) - 1) | st.integers(0, 1 << 32)


def by_value(shape: list[int], data: bytes, element_type: int = FLOAT32) -> tensor_pb2.Tensor:
    return tensor_pb2.Tensor(element_type=cast("tensor_pb2.ElementType", element_type), shape=shape, data=data)


def by_ref(shape: list[int], digest: str = DIGEST, expire_time_s: int = 0) -> tensor_pb2.Tensor:
    ref = tensor_pb2.TensorRef(digest=digest, holder_address=HOLDER, expire_time=Timestamp(seconds=expire_time_s))
    return tensor_pb2.Tensor(element_type=FLOAT32, shape=shape, ref=ref)


@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (1,) * 8])
@pytest.mark.parametrize(("element_type", "width"), WIDTHS.items())
def test_every_element_type_survives_by_value(element_type: str, width: int, shape: tuple[int, ...]) -> None:
    count = 6 if shape == (2, 3) else 1
    tensor = RawTensor(element_type, shape, bytes(range(count * width)))
    sent = value_message(tensor).SerializeToString()
    assert parse_tensor("latents", tensor_pb2.Tensor.FromString(sent)) == tensor


@pytest.mark.parametrize(("element_type", "width"), WIDTHS.items())
def test_every_element_type_survives_by_ref(element_type: str, width: int) -> None:
    tensor = RemoteTensor(element_type, (5, 7), DIGEST, HOLDER, 1_700_000_000.25)
    sent = ref_message(tensor).SerializeToString()
    assert parse_tensor("latents", tensor_pb2.Tensor.FromString(sent)) == tensor
    assert tensor.size_bytes == 35 * width


def test_a_tensor_goes_on_as_it_came() -> None:
    value, remote = RawTensor("uint8", (2,), b"ab"), RemoteTensor("uint8", (2,), DIGEST, HOLDER, 1.0)
    assert tensor_message(value).WhichOneof("content") == "data"
    assert tensor_message(remote).WhichOneof("content") == "ref"


def test_the_digest_is_sha_256_in_hexadecimal() -> None:
    assert digest_of(b"") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        (by_value([2, 2], bytes(15)), "has 15 bytes where its shape and type ask for 16"),
        (by_value([2, 2], bytes(17)), "has 17 bytes"),
        (by_value([2, 2], b""), "has 0 bytes"),
        (by_value([], b""), "ask for 4"),
        (by_value([-1], b""), "has an extent outside"),
        (by_value([-2, -2], bytes(16)), "has an extent outside"),
        (by_value([0], b""), "has an extent outside"),
        (by_value([1 << 31], b""), "has an extent outside"),
        (by_value([(1 << 63) - 1, 2], b""), "has an extent outside"),
        (by_value([1 << 20, 1 << 20], b""), "is larger than"),
        (by_ref([1 << 30]), "is larger than"),
        (by_ref([-1]), "has an extent outside"),
        (by_value([1] * 9, bytes(4)), "has 9 dimensions; at most 8"),
        (by_value([1] * 100_000, bytes(4)), "has 100000 dimensions"),
        (by_value([1], bytes(4), tensor_pb2.ELEMENT_TYPE_UNSPECIFIED), "unknown element type, 0"),
        (by_value([1], bytes(4), 7), "unknown element type, 7"),
        (by_value([1], bytes(4), -1), "unknown element type, -1"),
        (tensor_pb2.Tensor(element_type=FLOAT32, shape=[1]), "neither data nor ref"),
        (by_ref([1], ""), "digest is not 64 hexadecimal digits"),
        (by_ref([1], DIGEST[:-1]), "digest is not 64"),
        (by_ref([1], DIGEST + "0"), "digest is not 64"),
        (by_ref([1], DIGEST + "\n"), "digest is not 64"),
        (by_ref([1], DIGEST.upper()), "digest is not 64"),
        (by_ref([1], "../" * 21 + "e"), "digest is not 64"),
        (by_ref([1], DIGEST, 1 << 60), "expire_time is no timestamp"),
        (by_ref([1], DIGEST, -(1 << 60)), "expire_time is no timestamp"),
    ],
)
def test_a_bad_tensor_is_refused_by_name(message: tensor_pb2.Tensor, problem: str) -> None:
    with pytest.raises(InvalidTensor, match=problem) as caught:
        parse_tensor("latents", message)
    assert caught.value.facts["tensor"] == "latents"


def test_limits_themselves_are_allowed() -> None:
    assert parse_tensor("latents", by_value([1] * 8, bytes(4))).shape == (1,) * 8
    assert parse_tensor("latents", by_ref([1 << 28])).shape == (1 << 28,)


@given(st.binary(max_size=200))
def test_random_bytes_are_refused_or_are_a_tensor(raw: bytes) -> None:
    try:
        message = tensor_pb2.Tensor.FromString(raw)
    except DecodeError:
        return
    _parse_or_refuse(message)


@given(st.builds(by_value, SHAPES, st.binary(max_size=64), ELEMENT_TYPES) | st.builds(by_ref, SHAPES, DIGESTS, SECONDS))
def test_random_fields_are_refused_or_are_a_tensor(message: tensor_pb2.Tensor) -> None:
    _parse_or_refuse(message)


def _parse_or_refuse(message: tensor_pb2.Tensor) -> None:
    try:
        tensor = parse_tensor("latents", message)
    except InvalidTensor:
        return
    assert parse_tensor("latents", tensor_message(tensor)) == tensor
