"""A service's configuration: flags before environment before defaults, and an end for what is malformed."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from darkroom.runtime.config import read_config
from services.denoiser.config import DenoiserConfig
from services.encoder.config import EncoderConfig
from services.router.config import RouterConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleConfig:
    """Something of every kind."""

    store: Path
    count: int = 1
    room_bytes: int | None = None
    wait_s: float = 0.5
    reflection: bool = False
    preload: tuple[str, ...] = ("a",)
    log_folder: Path | None = None

    def __post_init__(self) -> None:
        """Raises ValueError."""
        if self.count < 1:
            raise ValueError(f"count must be at least 1, not {self.count}")


def read(*flags: str, **environment: str) -> SampleConfig:
    named = {f"DARKROOM_{name.upper()}": value for name, value in environment.items()}
    return read_config(SampleConfig, program="sample", arguments=flags, environment=named)


def refusal(capsys: pytest.CaptureFixture[str], *flags: str, **environment: str) -> str:
    with pytest.raises(SystemExit) as ended:
        read(*flags, **environment)
    assert ended.value.code == 2
    captured = capsys.readouterr()
    assert not captured.out
    assert "Traceback" not in captured.err
    return captured.err


def test_defaults_hold_where_nothing_is_said() -> None:
    assert read("--store", "/s") == SampleConfig(store=Path("/s"))


def test_the_environment_beats_the_default_and_a_flag_beats_both() -> None:
    assert read(store="/e").store == Path("/e")
    assert read("--store", "/f", store="/e").store == Path("/f")
    assert read("--store", "/f", count="3").count == 3
    assert read("--store", "/f", "--count", "4", count="3").count == 4


def test_every_kind_of_value_is_read() -> None:
    config = read("--store=/s", "--wait-s", "2", "--reflection", "True", "--preload", "x, y,,", "--log-folder", "/l")
    assert config == SampleConfig(
        store=Path("/s"), wait_s=2.0, reflection=True, preload=("x", "y"), log_folder=Path("/l")
    )
    assert read("--store=/s", "--preload", "").preload == ()


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("0", 0), ("-1", -1), ("1024", 1024), ("1024B", 1024), ("8GiB", 8 << 30), ("8 gib", 8 << 30),
        ("1.5G", 1_500_000_000), ("2k", 2000), ("3MiB", 3 << 20), ("4MB", 4_000_000), ("1T", 10**12), ("1TiB", 1 << 40),
    ],
)  # fmt: skip
def test_a_size_may_have_a_unit(text: str, size_bytes: int) -> None:
    assert read("--store=/s", f"--room-bytes={text}").room_bytes == size_bytes
    assert read(store="/s", room_bytes=text).room_bytes == size_bytes


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--room-bytes", "much"), ("--room-bytes", ""), ("--room-bytes", "8 GiBi"), ("--room-bytes", "1e3"),
        ("--count", "many"), ("--count", "1.5"), ("--count", ""), ("--wait-s", "soon"), ("--wait-s", "nan"),
        ("--wait-s", "inf"), ("--wait-s", "-Infinity"), ("--reflection", "yes"), ("--reflection", "1"),
    ],
)  # fmt: skip
def test_a_malformed_flag_ends_the_process_by_name(capsys: pytest.CaptureFixture[str], flag: str, value: str) -> None:
    assert f"{flag} must be" in refusal(capsys, "--store=/s", f"{flag}={value}")


def test_a_malformed_variable_ends_the_process_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert "DARKROOM_COUNT must be INTEGER, not 'many'" in refusal(capsys, "--store=/s", count="many")


def test_a_value_that_its_config_refuses_ends_the_process_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert "count must be at least 1, not 0" in refusal(capsys, "--store=/s", "--count=0")


def test_an_unknown_flag_ends_the_process(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--colour" in refusal(capsys, "--store=/s", "--colour=red")
    assert "--coun" in refusal(capsys, "--store=/s", "--coun=2")


def test_a_missing_value_without_default_ends_the_process_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--store" in refusal(capsys)


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (RouterConfig, "max_running", "0"), (RouterConfig, "default_deadline_s", "0"), (RouterConfig, "drain_s", "-1"),
        (RouterConfig, "replica_wait_s", "-0.1"), (DenoiserConfig, "threads", "0"),
        (DenoiserConfig, "max_running", "0"), (DenoiserConfig, "max_batch_rows", "-1"),
        (DenoiserConfig, "shelf_bytes", "0"),
        (DenoiserConfig, "inline_limit_bytes", "-1"), (DenoiserConfig, "inline_limit_bytes", str((1 << 20) + 1)),
        (DenoiserConfig, "drain_s", "-1"), (DenoiserConfig, "model_store", "/no/such/folder"),
        (EncoderConfig, "embedding_cache_bytes", "-1"), (EncoderConfig, "threads", "0"),
        (RouterConfig, "log_level", "loud"), (DenoiserConfig, "log_level", "INFO"),
    ],
)  # fmt: skip
def test_the_services_refuse_what_is_out_of_range(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, kind: type, field: str, value: str
) -> None:
    good = [] if kind is RouterConfig else ["--model-store", str(tmp_path)]
    with pytest.raises(SystemExit) as ended:
        read_config(kind, program="service", arguments=[*good, f"--{field.replace('_', '-')}={value}"], environment={})
    assert ended.value.code == 2
    assert field in capsys.readouterr().err.replace("-", "_")
