"""docker-compose.yml and the Dockerfiles it names agree with each other and with the tree. Needs no Docker."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
COMPOSE_FILE = ROOT / "docker-compose.yml"


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
