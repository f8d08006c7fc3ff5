"""The catalogue in the registry is the list it was published from."""

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from darkroom.registry import keys
from darkroom.registry.catalogue import LoraEntry, ModelEntry, publish_catalogue
from darkroom.registry.membership import ClusterView
from darkroom.registry.model_entry import parse_entry
from darkroom.registry.port import Registry
from tests.registry.entries import make_entry, make_lora_entry
from tests.registry.following import running, until, watching


def test_an_entry_survives_its_json() -> None:
    entry = make_entry("sd")
    assert ModelEntry.from_json(entry.to_json()) == entry


def test_fields_of_later_versions_are_passed_over() -> None:
    fields = json.loads(make_entry("sd").to_json())
    assert ModelEntry.from_json(json.dumps({**fields, "new": 1}).encode()) == make_entry("sd")


@pytest.mark.parametrize("name", json.loads(make_entry("sd").to_json()))
@pytest.mark.parametrize("value", [None, [None], {"a": 1}, True, float("nan"), 10**400])
def test_an_entry_with_a_field_of_another_kind_is_refused(name: str, value: object) -> None:
    fields = json.loads(make_entry("sd").to_json())
    if (name, value) == ("guided_above", None):
        return  # some models have no guidance
    if type(value) is int and type(fields[name]) is int:
        value = -1
    with pytest.raises(ValueError, match="not a model entry"):
        ModelEntry.from_json(json.dumps({**fields, name: value}).encode())


@settings(max_examples=50, deadline=None)
@given(
    st.binary() | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(lambda v: json.dumps(v).encode())
)
def test_bytes_that_are_no_entry_are_refused(value: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - whoever finds it first says it in its words
        ModelEntry.from_json(value)


def test_a_lora_entry_survives_its_json_and_is_told_from_a_model() -> None:
    for entry in (make_lora_entry("ink"), replace(make_lora_entry("ink"), base_model=None)):
        assert LoraEntry.from_json(entry.to_json()) == parse_entry(entry.to_json()) == entry
    assert parse_entry(make_entry("sd").to_json()) == make_entry("sd")
    with pytest.raises(ValueError, match="not a model entry"):
        ModelEntry.from_json(make_lora_entry("ink").to_json())


@pytest.mark.parametrize("name", ["lora_id", "base_model", "default_scale", "stages", "size_bytes"])
@pytest.mark.parametrize("value", [[None], {"a": 1}, True, float("nan"), 10**400])
def test_a_lora_entry_with_a_field_of_another_kind_is_refused(name: str, value: object) -> None:
    fields = json.loads(make_lora_entry("ink").to_json())
    value = -1 if name == "size_bytes" and type(value) is int else value
    with pytest.raises(ValueError, match="not a LoRA entry"):
        parse_entry(json.dumps({**fields, name: value}).encode())


async def test_loras_are_published_and_seen_beside_models(registry: Registry) -> None:
    view = ClusterView(registry)
    async with running(view.run()):
        await publish_catalogue(registry, [make_entry("sd"), make_lora_entry("ink"), make_lora_entry("chalk")])
        await until(lambda: view.loras() == (make_lora_entry("chalk"), make_lora_entry("ink")))
        assert view.models() == (make_entry("sd"),)
        assert (view.lora("ink"), view.lora("sd"), view.model("ink")) == (make_lora_entry("ink"), None, None)
        stronger = make_lora_entry("ink", default_scale=1.5)
        await publish_catalogue(registry, [make_entry("sd"), stronger])
        await until(lambda: view.loras() == (stronger,))
        await publish_catalogue(registry, [])
        await until(lambda: view.loras() == () and view.models() == ())


async def test_publishing_makes_the_catalogue_equal_to_the_list(registry: Registry) -> None:
    view = ClusterView(registry)
    async with running(view.run()):
        await publish_catalogue(registry, [make_entry("b"), make_entry("a")])
        await until(lambda: view.models() == (make_entry("a"), make_entry("b")))
        changed = make_entry("b", default_step_count=4)
        await publish_catalogue(registry, [changed, make_entry("c")])
        await until(lambda: view.models() == (changed, make_entry("c")))
        assert view.model("c") == make_entry("c")
        assert view.model("a") is None
        await publish_catalogue(registry, [])
        await until(lambda: view.models() == ())


async def test_publishing_the_same_list_again_writes_nothing(registry: Registry) -> None:
    await publish_catalogue(registry, [make_entry("a")])
    async with watching(registry, keys.MODELS) as states:
        await publish_catalogue(registry, [make_entry("a")])
        await registry.put(keys.model("b"), b"after")
        await until(lambda: len(states[-1]) == 2)
    assert len(states) == 2
