"""Range checks: each limit from both sides, and the field's name in every refusal."""

import math
import re
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from darkroom.errors import InvalidField
from darkroom.schedulers import DIFFUSION_SCHEDULERS
from darkroom.wire import fields

KNOWN = tuple(DIFFUSION_SCHEDULERS)


def refused(field: str, check: Callable[[], object]) -> str:
    with pytest.raises(InvalidField) as caught:
        check()
    assert caught.value.facts["field"] == field
    assert caught.value.message.startswith(f"{field} ")
    return caught.value.message


@pytest.mark.parametrize("value", ["a", "A-z_0.9", "x" * 64])
def test_a_request_id_is_kept(value: str) -> None:
    assert fields.check_request_id(value) == value


def test_an_empty_request_id_becomes_a_new_one() -> None:
    made = {fields.check_request_id("") for _ in range(10)}
    assert len(made) == 10
    assert all(re.fullmatch(r"[0-9a-f]{16}", one) for one in made)


@pytest.mark.parametrize("value", ["x" * 65, "a b", "a\n", "\0", "é", "a/b", "%s"])
def test_a_bad_request_id_is_refused(value: str) -> None:
    refused("request_id", lambda: fields.check_request_id(value))


@pytest.mark.parametrize("value", ["a", "0", "shapes", "sd-1.5", "a_b.c-d", "a" * 64])
def test_a_model_id_is_kept(value: str) -> None:
    assert fields.check_model_id(value) == value


@pytest.mark.parametrize(
    "value",
    [
        "", ".", "..", "../shapes", "..%2fshapes", "a/../b", "a..b", "/etc/passwd", "file:///etc/passwd", "file:x",
        "shapes\0", "shapes\n", "\uff0e\uff0e/shapes", "\uff41", "a" * 65, "a" * 4096, "http://169.254.169.254/",
        "Shapes", "-a", "_a", ".a", " shapes", "C:\\models", "~root", "a:b", "a%00",
    ],
)  # fmt: skip
def test_a_bad_model_id_is_refused(value: str) -> None:
    refused("model_id", lambda: fields.check_model_id(value))


@pytest.mark.parametrize(
    "value", ["a", "x" * 32_000, "<|endoftext|>", "{{7*7}}", "%s%n", "a\r\nb", "<b>x</b>", "é" * 32_000, " a ", "🜁"]
)
def test_a_prompt_is_kept_to_the_letter(value: str) -> None:
    assert fields.check_prompt(value) == value


@pytest.mark.parametrize(
    "value", ["", " ", "\t\r\n", "\u2003\u3000", "x" * 32_001, "a\0", "\0", "e" + "\u0301" * 100_000]
)
def test_a_bad_prompt_is_refused(value: str) -> None:
    refused("prompt", lambda: fields.check_prompt(value))


def test_a_refused_prompt_is_not_repeated() -> None:
    message = refused("prompt", lambda: fields.check_prompt("secret\0" * 5000))
    assert "secret" not in message


def test_a_negative_prompt_may_be_empty_and_no_longer_than_a_prompt() -> None:
    assert fields.check_negative_prompt("") == ""
    assert fields.check_negative_prompt("x" * 32_000)
    refused("negative_prompt", lambda: fields.check_negative_prompt("x" * 32_001))
    refused("negative_prompt", lambda: fields.check_negative_prompt("a\0"))


@pytest.mark.parametrize("value", [1, 2, 10])
def test_a_count_within_its_limits_is_kept(value: int) -> None:
    assert fields.check_count("image_count", value, 10) == value


@pytest.mark.parametrize("value", [0, -1, 11, (1 << 31) - 1, -(1 << 31)])
def test_a_count_out_of_its_limits_is_refused(value: int) -> None:
    assert f"1 to 10, not {value}" in refused("image_count", lambda: fields.check_count("image_count", value, 10))


@pytest.mark.parametrize("size", [(16, 16), (2048, 2048), (64, 1024)])
def test_a_size_within_its_limits_is_kept(size: tuple[int, int]) -> None:
    assert fields.check_size(*size, 8) == size


@pytest.mark.parametrize("value", [0, -8, 8, 15, 513, 2056, 65536, 99999])
def test_a_bad_width_or_height_is_refused_by_its_own_name(value: int) -> None:
    refused("width_px", lambda: fields.check_size(value, 64, 8))
    refused("height_px", lambda: fields.check_size(64, value, 8))


def test_a_size_that_is_no_multiple_says_of_what() -> None:
    assert "multiple of 16" in refused("height_px", lambda: fields.check_size(64, 72, 16))


def test_the_images_of_a_request_fit_into_one_message_together() -> None:
    fields.check_pixels(1024, 1024, 10)
    fields.check_pixels(2048, 2048, 2)
    said = refused("image_count", lambda: fields.check_pixels(2048, 2048, 3))
    assert said == "image_count must be at most 2 at 2048x2048, not 3"


@pytest.mark.parametrize("value", [0.0, 1.0, 7.5, 100.0])
def test_a_guidance_scale_within_its_limits_is_kept(value: float) -> None:
    assert fields.check_guidance_scale(value) == value


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1.0, -1e-9, 100.1, 1e308])
def test_a_bad_guidance_scale_is_refused(value: float) -> None:
    refused("guidance_scale", lambda: fields.check_guidance_scale(value))


def test_a_seed_leaves_room_for_its_successors() -> None:
    most = (1 << 63) - 1
    assert fields.check_seed(0) == 0
    assert fields.check_seed(most) == most
    assert fields.check_seed(most - 9, 10) == most - 9
    for value, image_count in ((-1, 1), (-2, 1), (most + 1, 1), (most - 8, 10), (most, 2)):
        refused("seed", lambda value=value, count=image_count: fields.check_seed(value, count))  # type: ignore[misc]


def test_a_scheduler_is_one_of_the_known_or_the_models_own() -> None:
    assert fields.check_scheduler("", KNOWN) == ""
    assert fields.check_scheduler("ddim", KNOWN) == "ddim"


def test_an_unknown_scheduler_is_refused_with_all_the_known_and_not_at_full_length() -> None:
    message = refused("scheduler", lambda: fields.check_scheduler("x" * 10_000, KNOWN))
    assert all(name in message for name in KNOWN)
    assert len(message) < 1000


@pytest.mark.parametrize(
    "values", [{}, {"prompt": "größer 🜁\n"}, {"k" * 79: "v" * 64_000}, {"ä": ""}, {f"k{i}": "v" for i in range(32)}]
)
def test_parameters_are_kept(values: dict[str, str]) -> None:
    assert fields.check_parameters(values) == values


@pytest.mark.parametrize(
    "values",
    [
        {"": "v"},
        {"k" * 80: "v"},
        {"k\0": "v"},
        {"k\n": "v"},
        {"ключ": "v"},
        {"k": "v\0"},
        {"k": "v" * 64_001},
        {f"k{i}": "v" for i in range(33)},
    ],
)
def test_bad_parameters_are_refused(values: dict[str, str]) -> None:
    assert len(refused("parameters", lambda: fields.check_parameters(values))) < 500


@given(st.text())
def test_any_model_id_is_safe_in_a_path_or_refused(value: str) -> None:
    try:
        kept = fields.check_model_id(value)
    except InvalidField:
        return
    assert kept.isascii()
    assert not set(kept) & set("/\\:%\0")
    assert ".." not in kept
