"""ControlNets and IP-Adapters of a model store are listed by their configs and sizes."""

from pathlib import Path

import pytest

from darkroom.registry.catalogue import CONTROLNET, IP_ADAPTER, GuideEntry, read_model_store
from darkroom.registry.model_entry import parse_entry
from tests.registry.test_lora_store import file_of, header
from tests.registry.test_model_store import make_model, write

WEIGHTS = file_of(header(["image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"]), 16)


def make_controlnet(root: Path, class_name: object = "ControlNetModel") -> None:
    write(root / "edges" / "config.json", {"_class_name": class_name})
    write(root / "edges" / "diffusion_pytorch_model.safetensors", WEIGHTS)


def make_ip_adapter(root: Path, settings: dict[str, object] | None = None) -> None:
    write(root / "style" / "ip_adapter.safetensors", WEIGHTS)
    write(root / "style" / "image_encoder" / "config.json", {})
    if settings:
        write(root / "style" / "darkroom.json", settings)


def test_controlnets_and_ip_adapters_are_listed_beside_models(tmp_path: Path) -> None:
    make_model(tmp_path)
    make_controlnet(tmp_path)
    make_ip_adapter(tmp_path, {"base_model": "sd"})
    listing = read_model_store(tmp_path)
    assert listing.refused == {}
    assert listing.loras == ()
    edges, style = listing.guides
    families = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
    sizes = [sum(file.stat().st_size for file in (tmp_path / name).rglob("*.*")) for name in ("edges", "style")]
    sizes[1] -= (tmp_path / "style" / "darkroom.json").stat().st_size
    assert edges == GuideEntry(
        guide_id="edges", role=CONTROLNET, pipelines=families, base_model=None, size_bytes=sizes[0]
    )
    assert (style.guide_id, style.role, style.base_model, style.size_bytes) == ("style", IP_ADAPTER, "sd", sizes[1])
    assert set(families) < set(style.pipelines)
    assert [parse_entry(entry.to_json()) for entry in listing.entries] == list(listing.entries)


@pytest.mark.parametrize(
    ("class_name", "problem"),
    [("UNet2DConditionModel", "none of ControlNetModel"), (7, "none of ControlNetModel")],
)
def test_a_network_that_is_no_controlnet_is_refused(tmp_path: Path, class_name: object, problem: str) -> None:
    make_controlnet(tmp_path, class_name)
    assert problem in read_model_store(tmp_path).refused["edges"]


def test_a_controlnet_may_name_the_model_that_it_is_for(tmp_path: Path) -> None:
    make_model(tmp_path)
    make_controlnet(tmp_path)
    write(tmp_path / "edges" / "darkroom.json", {"base_model": "sd"})
    assert [guide.base_model for guide in read_model_store(tmp_path).guides] == ["sd"]
    write(tmp_path / "edges" / "darkroom.json", {"base_model": "xl"})
    assert "base_model xl" in read_model_store(tmp_path).refused["edges"]


def test_a_config_without_a_class_makes_no_controlnet(tmp_path: Path) -> None:
    make_controlnet(tmp_path, None)
    assert read_model_store(tmp_path).entries == ()
    make_ip_adapter(tmp_path)
    write(tmp_path / "style" / "config.json", {"made_by": "somebody"})
    assert [guide.guide_id for guide in read_model_store(tmp_path).guides] == ["style"]


def test_ip_adapters_may_share_an_image_encoder_by_a_link(tmp_path: Path) -> None:
    make_ip_adapter(tmp_path)
    write(tmp_path / "other" / "ip_adapter.safetensors", WEIGHTS)
    (tmp_path / "other" / "image_encoder").symlink_to(tmp_path / "style" / "image_encoder")
    listing = read_model_store(tmp_path)
    assert listing.refused == {}
    assert [guide.size_bytes for guide in listing.guides] == [len(WEIGHTS) + 2] * 2


def test_an_ip_adapter_is_refused_with_its_reason(tmp_path: Path) -> None:
    make_model(tmp_path)
    make_ip_adapter(tmp_path, {"base_model": "xl"})
    assert "base_model xl" in read_model_store(tmp_path).refused["style"]
    make_ip_adapter(tmp_path, {"base": "sd"})
    assert "unknown key 'base'" in read_model_store(tmp_path).refused["style"]
    write(tmp_path / "style" / "other.safetensors", WEIGHTS)
    assert "2 safetensors files" in read_model_store(tmp_path).refused["style"]


@pytest.mark.parametrize("text", [b'{"kind": "guide"}', b'{"kind": "guide", "guide_id": 1}'])
def test_what_is_no_entry_is_no_guide(text: bytes) -> None:
    with pytest.raises(ValueError, match="not a ControlNet"):
        parse_entry(text)
