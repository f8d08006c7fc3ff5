"""The stages' requests as checked values."""

from typing import Any

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from darkroom.errors import InvalidField, InvalidRequest, InvalidTensor
from darkroom.v1 import denoiser_pb2, encoder_pb2, lora_pb2, tensor_pb2, vae_pb2
from darkroom.wire.conditions import fill
from darkroom.wire.tasks import parse_decode, parse_denoise, parse_encode
from darkroom.wire.tensors import RawTensor, value_message

TENSOR = RawTensor("float32", (1, 2), bytes(8))


def named(name: str) -> tensor_pb2.NamedTensor:
    return tensor_pb2.NamedTensor(name=name, tensor=value_message(TENSOR))


def denoise_request(**changes: Any) -> denoiser_pb2.DenoiseRequest:
    good = {
        "model_id": "shapes", "embeddings": [named("prompt_embeds")], "width_px": 64, "height_px": 32, "step_count": 4,
        "guidance_scale": 2.5, "seed": 7, "image_count": 2, "scheduler": "euler",
    }  # fmt: skip
    return denoiser_pb2.DenoiseRequest(**{**good, **changes})


def decode_request(**changes: Any) -> vae_pb2.DecodeRequest:
    good = {
        "model_id": "shapes", "latents": value_message(TENSOR), "width_px": 64, "height_px": 32,
        "format": vae_pb2.IMAGE_FORMAT_PNG, "parameters": {"prompt": "x"},
    }  # fmt: skip
    return vae_pb2.DecodeRequest(**{**good, **changes})


def test_an_encode_request_becomes_a_task() -> None:
    message = encoder_pb2.EncodeRequest(
        request_id="r", model_id="shapes", prompt="a ring", negative_prompt="red", guided=True, deterministic=True
    )
    task = parse_encode(message)
    assert (task.request_id, task.model_id, task.prompt, task.negative_prompt) == ("r", "shapes", "a ring", "red")
    assert task.guided
    assert task.deterministic


def test_a_denoise_request_becomes_a_task() -> None:
    task = parse_denoise(denoise_request(request_id="r"))
    assert task.embeddings == {"prompt_embeds": TENSOR}
    assert (task.width_px, task.height_px, task.step_count, task.guidance_scale) == (64, 32, 4, 2.5)
    assert (task.seed, task.image_count, task.scheduler, task.deterministic) == (7, 2, "euler", False)


def test_a_decode_request_becomes_a_task() -> None:
    task = parse_decode(decode_request())
    assert (task.latents, task.width_px, task.height_px) == (TENSOR, 64, 32)
    assert task.parameters == {"prompt": "x"}


@pytest.mark.parametrize("field", ["request_id", "model_id", "prompt", "negative_prompt"])
def test_an_encode_request_is_refused_by_field(field: str) -> None:
    message = encoder_pb2.EncodeRequest(model_id="shapes", prompt="x")
    setattr(message, field, "\0")
    with pytest.raises(InvalidField) as caught:
        parse_encode(message)
    assert caught.value.facts["field"] == field


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("request_id", "a b"), ("model_id", ""), ("embeddings", []), ("embeddings", [named(str(i)) for i in range(17)]),
        ("width_px", 0), ("height_px", 4096), ("step_count", 0), ("step_count", 1001), ("guidance_scale", float("nan")),
        ("seed", -1), ("image_count", 0), ("image_count", 11), ("scheduler", "none"),
    ],
)  # fmt: skip
def test_a_denoise_request_is_refused_by_field(field: str, value: object) -> None:
    with pytest.raises(InvalidField) as caught:
        parse_denoise(denoise_request(**{field: value}))
    assert caught.value.facts["field"] == field


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("request_id", "a b"), ("model_id", "../x"), ("width_px", 0), ("height_px", -1), ("parameters", {"\n": ""}),
        ("format", vae_pb2.IMAGE_FORMAT_UNSPECIFIED), ("format", 99),
    ],
)  # fmt: skip
def test_a_decode_request_is_refused_by_field(field: str, value: object) -> None:
    with pytest.raises(InvalidField) as caught:
        parse_decode(decode_request(**{field: value}))
    assert caught.value.facts["field"] == field


def test_an_embedding_given_twice_is_refused_by_name() -> None:
    with pytest.raises(InvalidTensor, match="prompt_embeds is given twice"):
        parse_denoise(denoise_request(embeddings=[named("prompt_embeds"), named("prompt_embeds")]))


def test_a_bad_tensor_inside_a_request_is_refused_by_name() -> None:
    bad = tensor_pb2.NamedTensor(name="prompt_embeds", tensor=tensor_pb2.Tensor(shape=[1]))
    with pytest.raises(InvalidTensor) as caught:
        parse_denoise(denoise_request(embeddings=[bad]))
    assert caught.value.facts["tensor"] == "prompt_embeds"
    with pytest.raises(InvalidTensor) as caught:
        parse_decode(decode_request(latents=tensor_pb2.Tensor()))
    assert caught.value.facts["tensor"] == "latents"


PARSERS = [
    (encoder_pb2.EncodeRequest, parse_encode),
    (denoiser_pb2.DenoiseRequest, parse_denoise),
    (vae_pb2.DecodeRequest, parse_decode),
]


@pytest.mark.parametrize(("kind", "parse"), PARSERS)
@given(raw=st.binary(max_size=120))
def test_random_bytes_are_no_message_or_no_request(kind: Any, parse: Any, raw: bytes) -> None:
    """A whole request out of random bytes would be a miracle: it needs a model's id."""
    with pytest.raises((DecodeError, InvalidRequest)):
        parse(kind.FromString(raw))


LORAS = {
    "no id": ([lora_pb2.Lora()], "loras[0].lora_id"),
    "path": ([lora_pb2.Lora(lora_id="ink"), lora_pb2.Lora(lora_id="../ink")], "loras[1].lora_id"),
    "scale": ([lora_pb2.Lora(lora_id="ink", scale=float("nan"))], "loras[0].scale"),
    "large scale": ([lora_pb2.Lora(lora_id="ink", scale=101)], "loras[0].scale"),
    "many": ([lora_pb2.Lora(lora_id="ink")] * 9, "loras"),
    "forty": ([lora_pb2.Lora(lora_id="ink")] * 40, "loras"),
}
CONDITIONS: dict[str, tuple[dict[str, Any], str]] = {
    "mask alone": ({"mask": b"x"}, "mask"),
    "strength alone": ({"strength": 0.5}, "strength"),
    "strength 2": ({"image": b"x", "strength": 2.0}, "strength"),
    "strength 0": ({"image": b"x", "strength": 0.0}, "strength"),
    "strength NaN": ({"image": b"x", "strength": float("nan")}, "strength"),
    "21 MB": ({"image": bytes(21 << 20)}, "image"),
    "control without a picture": ({"controls": [{"controlnet_id": "edges"}]}, "controls[0].image"),
    "control without an id": ({"controls": [{"image": b"x"}]}, "controls[0].controlnet_id"),
    "control scale": ({"controls": [{"controlnet_id": "edges", "image": b"x", "scale": 11.0}]}, "controls[0].scale"),
    "control ends first": (
        {"controls": [{"controlnet_id": "edges", "image": b"x", "start": 0.5, "end": 0.5}]},
        "controls[0].end",
    ),
    "five controls": ({"controls": [{"controlnet_id": "edges", "image": b"x"}] * 5}, "controls"),
}


@pytest.mark.parametrize("case", LORAS)
def test_wrong_loras_are_refused_by_place(case: str) -> None:
    loras, field = LORAS[case]
    with pytest.raises(InvalidField) as refused:
        parse_denoise(denoise_request(loras=loras))
    assert refused.value.facts["field"] == field


@pytest.mark.parametrize("case", CONDITIONS)
def test_wrong_conditions_are_refused_by_field(case: str) -> None:
    changes, field = CONDITIONS[case]
    with pytest.raises(InvalidField) as refused:
        parse_denoise(denoise_request(**changes))
    assert refused.value.facts["field"] == field


def test_conditions_survive_the_wire_and_make_another_task() -> None:
    control = {"controlnet_id": "edges", "image": b"c", "scale": 0.5, "start": 0.1, "end": 0.9}
    message = denoise_request(image=b"i", mask=b"m", strength=0.25, controls=[control])
    task = parse_denoise(message)
    copied = denoise_request()
    fill(copied, task.conditions)
    assert parse_denoise(copied).conditions == task.conditions
    others = [denoise_request(), denoise_request(image=b"i"), denoise_request(image=b"j"), message]
    assert len({parse_denoise(other).digest for other in others}) == 4
