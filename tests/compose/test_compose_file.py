"""docker-compose.yml and the Dockerfiles it names agree with each other and with the tree. Needs no Docker."""

import os
import re
import shutil
import subprocess
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from darkroom.runtime.config import read_config
from services.cachemgr.config import CacheManagerConfig
from services.denoiser.config import DenoiserConfig
from services.encoder.config import EncoderConfig
from services.router.config import RouterConfig
from services.vae.config import VaeConfig

ROOT = Path(__file__).resolve().parents[2]
COMPOSE_FILE = ROOT / "docker-compose.yml"
CONFIGS = {
    "cachemgr": CacheManagerConfig,
    "denoiser": DenoiserConfig,
    "encoder": EncoderConfig,
    "router": RouterConfig,
    "vae": VaeConfig,
}
STAGES = ("denoiser", "encoder", "vae")


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    """The file as YAML reads it."""
    return dict(yaml.safe_load(COMPOSE_FILE.read_text()))


def _dockerfile(service: dict[str, Any]) -> Path | None:
    build = service.get("build")
    if build is None:
        return None
    if isinstance(build, str):
        return ROOT / build / "Dockerfile"
    return ROOT / str(build.get("context", ".")) / str(build.get("dockerfile", "Dockerfile"))


def _dockerfiles(compose: dict[str, Any]) -> set[Path]:
    found = (_dockerfile(service) for service in compose["services"].values())
    return {path for path in found if path is not None}


def test_the_file_has_only_the_sections_it_needs(compose: dict[str, Any]) -> None:
    extensions = {key for key in compose if key.startswith("x-")}
    assert set(compose) <= {"version", "name", "services", "volumes", "networks"} | extensions
    assert compose["services"]


def test_every_service_runs_an_image_or_builds_one(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        assert "image" in service or "build" in service, name
        dockerfile = _dockerfile(service)
        assert dockerfile is None or dockerfile.is_file(), f"{name}: no {dockerfile}"


def test_every_folder_of_services_has_a_container(compose: dict[str, Any]) -> None:
    for folder in (path.parent.name for path in (ROOT / "services").glob("*/__main__.py")):
        assert any(name == folder or name.startswith(f"{folder}-") for name in compose["services"]), folder


def test_services_depend_on_services_that_exist(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        assert set(service.get("depends_on", ())) <= set(compose["services"]) - {name}, name


def test_named_volumes_and_networks_are_declared(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        sources = [v["source"] if isinstance(v, dict) else v.split(":")[0] for v in service.get("volumes", ())]
        named = {source for source in sources if not source.startswith((".", "/", "~", "$"))}
        assert named <= set(compose.get("volumes") or ()), name
        assert set(service.get("networks", ())) <= set(compose.get("networks") or ()), name


def test_no_two_services_publish_the_same_port(compose: dict[str, Any]) -> None:
    published = [
        str(port).rpartition(":")[0]
        for service in compose["services"].values()
        for port in service.get("ports", ())
        if ":" in str(port)
    ]
    assert len(published) == len(set(published))


def test_who_reads_a_store_keeps_its_files_where_it_can_write(compose: dict[str, Any]) -> None:
    for name in (*STAGES, "cachemgr"):
        service = compose["services"][name]
        folder = service["environment"]["DARKROOM_STORE_CACHE"]
        (volume,) = [v.split(":") for v in service["volumes"] if v.split(":")[1] == folder]
        assert volume[0] in compose["volumes"], f"{name}: a volume of its own name outlives the container"
        assert len(volume) == 2, f"{name}: it is writable"
        dockerfile = _dockerfile(service)
        assert dockerfile is not None
        assert f"-m 1777 {folder}" in dockerfile.read_text(), f"{name}: else the volume is root's"


@pytest.mark.parametrize("name", CONFIGS)
def test_services_are_told_only_what_they_know(compose: dict[str, Any], name: str) -> None:
    known = {field.name for field in fields(CONFIGS[name])}
    told = {key.removeprefix("DARKROOM_").lower() for key in compose["services"][name]["environment"] if "DARK" in key}
    assert told <= known


def _composed(**variables: str) -> dict[str, Any]:
    """The services as Compose itself reads them."""
    command = shutil.which("docker-compose")
    if command is None:
        pytest.skip("docker-compose is not installed")
    run = subprocess.run(
        [command, "-f", COMPOSE_FILE, "config"],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": os.environ["PATH"], **variables},
    )
    return dict(yaml.safe_load(run.stdout)["services"])


def _told(service: dict[str, Any], kind: type) -> Any:
    """The configuration that a service in its container reads."""
    environment = {key: str(value) for key, value in service["environment"].items() if value is not None}
    environment.setdefault("DARKROOM_MODEL_STORE", str(ROOT / "models"))
    return read_config(kind, program="service", arguments=[], environment=environment)


def test_bounds_and_a_stores_url_reach_the_services() -> None:
    services = _composed(
        DARKROOM_STORE="s3://weights/models",
        DARKROOM_DEVICE_BUDGET_BYTES="8GiB",
        DARKROOM_HOST_CACHE_BYTES="1GiB",
        DARKROOM_STORE_CACHE_BYTES="2GiB",
        DARKROOM_EVICTION="lru",
        DARKROOM_HOUR_PREFETCH="true",
        DARKROOM_MERGED_PAIRS="50",
        AWS_ACCESS_KEY_ID="key",
    )
    for name in STAGES:
        said = _told(services[name], CONFIGS[name])
        assert (said.device_budget_bytes, said.host_cache_bytes, said.eviction) == (8 << 30, 1 << 30, "lru")
    assert _told(services["denoiser"], DenoiserConfig).merged_pairs == 50
    for name in (*STAGES, "cachemgr"):
        said = _told(services[name], CONFIGS[name])
        assert (said.model_store, said.store_cache_bytes) == ("s3://weights/models", 2 << 30)
        assert services[name]["environment"]["AWS_ACCESS_KEY_ID"] == "key"
    assert _told(services["cachemgr"], CONFIGS["cachemgr"]).hour_prefetch


def test_what_is_not_said_is_each_services_own_default() -> None:
    services = _composed()
    for name in STAGES:
        environment = services[name]["environment"]
        assert environment.pop("DARKROOM_MODEL_STORE") == "/models"
        said, own = _told(services[name], CONFIGS[name]), CONFIGS[name](model_store=ROOT / "models")
        for field in ("device_budget_bytes", "host_cache_bytes", "pool_bytes", "store_cache_bytes", "eviction"):
            assert getattr(said, field) == getattr(own, field)
    assert not _told(services["cachemgr"], CONFIGS["cachemgr"]).hour_prefetch


def test_several_cache_managers_take_a_range_of_ports() -> None:
    ports = _composed(DARKROOM_CACHEMGR_PORT="7601-7603")["cachemgr"]["ports"]
    assert [str(port) for port in ports] == ["127.0.0.1:7601-7603:7600/tcp"]


def test_what_dockerfiles_copy_exists(compose: dict[str, Any]) -> None:
    for dockerfile in _dockerfiles(compose):
        text = dockerfile.read_text().replace("\\\n", " ")
        for line in re.findall(r"^COPY +(?!.*--from=)(.+)$", text, flags=re.MULTILINE):
            *sources, _ = [word for word in line.split() if not word.startswith("--")]
            for source in sources:
                assert list(ROOT.glob(source)), f"{dockerfile.relative_to(ROOT)} copies {source}, which does not exist"


def test_compose_itself_accepts_the_file() -> None:
    command = shutil.which("docker-compose")
    if command is None:
        pytest.skip("docker-compose is not installed")
    run = subprocess.run([command, "-f", COMPOSE_FILE, "config", "-q"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
