"""Keys are built and parsed in one place, and nothing put into a key can lead out of its place."""

import pytest

from darkroom.registry import keys


def test_a_key_built_is_parsed_into_what_it_was_built_from() -> None:
    assert keys.member("vae", "vae-1") == "/darkroom/v1/members/vae/vae-1"
    assert keys.parse_member(keys.member("vae", "vae-1")) == keys.MemberKey(stage="vae", replica_id="vae-1")
    assert keys.residency("vae-1", "sd.1_5") == "/darkroom/v1/residency/vae-1/sd.1_5"
    assert keys.residency("vae-1", "sd").startswith(keys.residency_of("vae-1"))
    assert keys.parse_residency(keys.residency("vae-1", "sd")) == keys.ResidencyKey(replica_id="vae-1", model_id="sd")
    assert keys.pin("sd") == "/darkroom/v1/wishes/pins/sd"
    assert keys.parse_pin(keys.pin("sd")) == "sd"
    assert keys.wish("w1") == "/darkroom/v1/wishes/once/w1"
    assert keys.parse_wish(keys.wish("w1")) == "w1"
    assert keys.model("sd") == "/darkroom/v1/models/sd"
    assert keys.parse_model(keys.model("sd")) == "sd"


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "a b", "ä", "a\n", "x" * 129])
def test_a_name_that_is_no_single_segment_is_refused(name: str) -> None:
    for build in (keys.model, keys.residency_of, keys.pin, keys.wish, lambda value: keys.member("vae", value)):
        with pytest.raises(ValueError, match="cannot be part of a registry key"):
            build(name)


@pytest.mark.parametrize(
    "key", ["", "/darkroom/v1/members/vae", "/darkroom/v1/members/vae/a/b", "/other/members/vae/a"]
)
def test_a_key_of_another_kind_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match="not a key of"):
        keys.parse_member(key)
