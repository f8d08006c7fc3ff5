"""Networks copied before they have weights: each is the caller's own, and constructors run once per config."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from darkroom.models import blueprints, building
from darkroom.models.blueprints import Blueprints
from darkroom.models.building import meta_network
from darkroom.models.loader import load_part

_SHAPES = Path(__file__).parents[2] / "models"
CPU = torch.device("cpu")


class Tabled(torch.nn.Module):
    """Two layers with one weight, a table of its own, a buffer that files hold, and whatever else it is given."""

    def __init__(self, held: Any = None) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.register_buffer("table", torch.arange(3.0), persistent=False)
        self.register_buffer("stored", torch.ones(2))
        self.plain, self.held = torch.arange(2), held


def counted(make: Callable[[], torch.nn.Module]) -> tuple[Callable[[], torch.nn.Module], list[torch.nn.Module]]:
    made: list[torch.nn.Module] = []

    def counting() -> torch.nn.Module:
        made.append(make())
        return made[-1]

    return counting, made


def test_copies_hold_tables_of_their_own_and_no_weights() -> None:
    kept = Blueprints()
    make, made = counted(Tabled)
    networks: list[Any] = [kept.network("key", make) for _ in range(3)]
    first, second, third = networks
    assert made == [first]
    assert {type(second), type(third)} == {Tabled}
    second.table[0] = second.plain[0] = 7
    second.extra = True
    assert third.table.tolist() == [0, 1, 2]
    assert third.plain.tolist() == [0, 1]
    assert not hasattr(third, "extra")
    assert third.first.weight is third.second.weight
    assert third.first.weight is not second.first.weight
    assert list(third.state_dict()) == list(made[0].state_dict())
    assert all(tensor.is_meta for tensor in third.state_dict().values())


class OnlyWritten:
    """Can be pickled and not come back."""

    def __reduce__(self) -> tuple[type, tuple[str]]:
        return int, ("none",)


@pytest.mark.parametrize("held", [lambda: 1, OnlyWritten()], ids=["pickled", "unpickled"])
def test_what_cannot_be_copied_is_made_every_time(held: Any) -> None:
    make, made = counted(lambda: Tabled(held=held))
    kept = Blueprints()
    assert [kept.network("key", make), kept.network("key", make)] == made


def test_those_used_longest_ago_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    make, made = counted(Tabled)
    kept = Blueprints()
    kept.network("one", make)
    monkeypatch.setattr(blueprints, "_MAX_BYTES", int(2.5 * len(kept._kept["one"])))
    made.clear()
    for key in ("two", "one", "three", "one", "two"):
        kept.network(key, make)
    assert len(made) == 3


def test_models_of_one_config_are_constructed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[type] = []
    construct = diffusers.ConfigMixin.from_config.__func__

    def from_config(kind: type, *args: Any, **kwargs: Any) -> Any:
        made.append(kind)
        return construct(kind, *args, **kwargs)

    monkeypatch.setattr(diffusers.ConfigMixin, "from_config", classmethod(from_config))
    monkeypatch.setattr(building, "_blueprints", Blueprints())
    load_part(_SHAPES, "shapes", "denoiser", CPU)
    assert [kind for kind in made if issubclass(kind, diffusers.ModelMixin)] == [
        diffusers.UNet2DConditionModel,
        diffusers.AutoencoderKL,
    ]
    made.clear()
    load_part(_SHAPES, "shapes", "denoiser", CPU)
    load_part(_SHAPES, "shapes-turbo", "denoiser", CPU)  # a UNet of another config, the same VAE
    assert [kind for kind in made if issubclass(kind, diffusers.ModelMixin)] == [diffusers.UNet2DConditionModel]


def test_another_config_is_another_network(tmp_path: Path) -> None:
    config = (_SHAPES / "shapes" / "vae" / "config.json").read_text()
    for name, text in (("one", config), ("two", config.replace('"latent_channels": 4', '"latent_channels": 8'))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    one, two = (meta_network(diffusers.AutoencoderKL, tmp_path / name) for name in ("one", "two"))
    assert (one.config.latent_channels, two.config.latent_channels) == (4, 8)  # type: ignore[union-attr]
