"""The command line as a user types it, against a cluster that the command itself starts."""

import asyncio
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image

from darkroom.registry import keys
from darkroom.registry.etcd import EtcdRegistry
from tests.shipped import MODELS

_PROCESSES_OF_UP = 7
"""etcd, cache manager, router, zygote, and one of each stage."""
DARKROOM = str(Path(sys.executable).parent / "darkroom")


def picture(file: Path) -> Image.Image:
    """The picture in a file, which is closed."""
    return Image.open(io.BytesIO(file.read_bytes()))


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    state = tmp_path_factory.mktemp("state")
    return {
        **os.environ,
        "XDG_STATE_HOME": str(state),
        "DARKROOM_MODEL_STORE": str(MODELS),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "220",
    }


@pytest.fixture(scope="module")
def cluster(environment: dict[str, str]) -> Iterator["subprocess.Popen[str]"]:
    """`darkroom up`, until its banner."""
    process = subprocess.Popen(
        [DARKROOM, "up", "--denoisers", "1", "--port", "0"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert "Darkroom is up" in process.stdout.readline()
    yield process
    process.send_signal(signal.SIGINT)
    process.wait(timeout=60)
    process.stdout.close()
    assert process.stderr is not None
    process.stderr.close()


def darkroom(environment: dict[str, str], *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [DARKROOM, *arguments], env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_run_draws_into_the_named_file(cluster: object, environment: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "a" / "circle.png"
    done = darkroom(
        environment,
        "run",
        "a red circle",
        "-o",
        str(file),
        "--steps",
        "5",
        "--seed",
        "3",
        "--size",
        "96x64",
        "--scheduler",
        "euler",
    )
    assert done.returncode == 0, done.stderr
    assert picture(file).size == (96, 64)
    assert picture(file).info["scheduler"] == "euler"
    assert "seed 3" in done.stdout


def test_run_with_json_prints_one_line(cluster: object, environment: dict[str, str], tmp_path: Path) -> None:
    done = darkroom(
        environment,
        "run",
        "a ring",
        "-o",
        str(tmp_path / "r.png"),
        "--steps",
        "2",
        "--count",
        "2",
        "--deterministic",
        "--json",
    )
    answer = json.loads(done.stdout)
    assert [Path(f).name for f in answer["files"]] == ["r-0.png", "r-1.png"]
    assert set(answer["stages_s"]) == {"encoder", "denoiser", "vae"}


def test_ps_shows_replicas_and_what_they_hold(cluster: object, environment: dict[str, str], tmp_path: Path) -> None:
    darkroom(environment, "run", "a ring", "-o", str(tmp_path / "r.png"), "--steps", "2")
    rows = json.loads(darkroom(environment, "ps", "--json").stdout)
    holds = {row["stage"]: {name for name, size in row["models"]["shapes"].items() if size} for row in rows}
    assert holds == {"encoder": {"text_encoder"}, "denoiser": {"unet"}, "vae": {"vae"}}
    assert "unet" in darkroom(environment, "ps").stdout


def test_models_lists_the_catalogue(cluster: object, environment: dict[str, str]) -> None:
    models = json.loads(darkroom(environment, "models", "--json").stdout)
    shapes = next(model for model in models if model["model_id"] == "shapes")
    assert shapes["pipeline"] == "StableDiffusionPipeline"
    assert shapes["schedulers"][0] == "ddim"
    assert "shapes" in darkroom(environment, "models").stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("run", "a ring", "--steps", "0"), "step_count must be 1 to 1000, not 0"),
        (("run", "a ring", "--size", "big"), "--size must be WIDTHxHEIGHT"),
        (("run", "a ring", "--model", "nothing"), "'nothing' is not in the catalogue"),
        (("run", "  "), "prompt must not be empty"),
    ],
)
def test_a_mistake_is_named_and_exits_with_2(
    cluster: object, environment: dict[str, str], tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    done = darkroom(environment, *arguments, *(("-o", str(tmp_path / "x.png")) if arguments[0] == "run" else ()))
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_ps_without_a_cluster_says_how_to_get_one(environment: dict[str, str], tmp_path: Path) -> None:
    done = darkroom({**environment, "XDG_STATE_HOME": str(tmp_path)}, "ps")
    assert done.returncode == 3
    assert "darkroom up" in done.stderr


def test_run_without_a_cluster_starts_one_and_stops_it(environment: dict[str, str], tmp_path: Path) -> None:
    done = darkroom(
        {**environment, "XDG_STATE_HOME": str(tmp_path)},
        "run",
        "a red circle",
        "-o",
        str(tmp_path / "c.png"),
        "--steps",
        "3",
    )
    assert done.returncode == 0, done.stderr
    assert picture(tmp_path / "c.png").size == (128, 128)


def test_a_cluster_takes_its_bound_from_the_environment(environment: dict[str, str], tmp_path: Path) -> None:
    own = {**environment, "XDG_STATE_HOME": str(tmp_path), "DARKROOM_DEVICE_BUDGET_BYTES": "2KiB"}
    done = darkroom(own, "run", "a red circle", "-o", str(tmp_path / "c.png"))
    assert done.returncode == 1
    assert "the device has 2048 for models" in done.stderr


def until_told(ask: Callable[[], Any]) -> Any:
    """The first answer that says anything."""
    for _ in range(30):
        if said := ask():
            return said
        time.sleep(1)
    raise AssertionError("nothing in half a minute")


async def kept_by_the_hour(state: Path) -> bytes | None:
    registry = EtcdRegistry([json.loads((state / "darkroom" / "cluster.json").read_text())["etcd"]])
    try:
        return (await registry.read(keys.HABITS)).get(keys.HABITS)
    finally:
        await registry.close()


def test_up_hands_on_what_it_is_told(environment: dict[str, str], tmp_path: Path) -> None:
    own = {**environment, "XDG_STATE_HOME": str(tmp_path), "DARKROOM_DEVICE_BUDGET_BYTES": "8GiB"}
    options = ["--device-budget-bytes", "1KiB", "--eviction", "lru", "--host-cache-bytes", "1MB", "--hour-prefetch"]
    with subprocess.Popen(
        [DARKROOM, "up", "--denoisers", "1", "--port", "0", *options],
        env=own,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert "Darkroom is up" in process.stdout.readline()
        done = darkroom(own, "run", "a red circle", "-o", str(tmp_path / "c.png"))
        wished = darkroom(own, "cache", "prefetch", "shapes", "--stage", "denoiser")
        problems = until_told(lambda: json.loads(darkroom(own, "cache", "describe", "--json").stdout)["problems"])
        described = darkroom(own, "cache", "describe").stdout
        habits = until_told(lambda: asyncio.run(kept_by_the_hour(tmp_path)))
        process.send_signal(signal.SIGINT)
    assert json.loads(habits)["slot_count"] == 24
    assert done.returncode == 1
    assert "the device has 1024 for models" in done.stderr
    assert wished.returncode == 0, wished.stderr
    (problem,) = problems
    assert problem["model_id"] == "shapes"
    assert "UNUSABLE_MODEL" in problem["problem"]
    assert f"{problem['replica_id']} could not bring shapes: UNUSABLE_MODEL" in described


@pytest.mark.parametrize(("option", "value"), [("--device-budget-bytes", "lots"), ("--eviction", "fifo")])
def test_up_refuses_what_is_no_bound(environment: dict[str, str], option: str, value: str) -> None:
    done = darkroom(environment, "up", option, value)
    assert done.returncode == 2
    assert option in done.stderr
    assert value in done.stderr


def test_ctrl_c_stops_everything_that_up_started(environment: dict[str, str], tmp_path: Path) -> None:
    own = {**environment, "XDG_STATE_HOME": str(tmp_path)}
    with subprocess.Popen(
        [DARKROOM, "up", "--denoisers", "1", "--port", "0"],
        env=own,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert "Darkroom is up" in process.stdout.readline()
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0
    assert len(children) == _PROCESSES_OF_UP
    assert not psutil.wait_procs(children, timeout=2)[1]
    assert not (tmp_path / "darkroom" / "cluster.json").exists()


def test_kill_9_of_up_leaves_no_process_behind(environment: dict[str, str], tmp_path: Path) -> None:
    own = {**environment, "XDG_STATE_HOME": str(tmp_path)}
    with subprocess.Popen(
        [DARKROOM, "up", "--denoisers", "1", "--port", "0"],
        env=own,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert "Darkroom is up" in process.stdout.readline()
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
    assert len(children) == _PROCESSES_OF_UP
    assert not psutil.wait_procs(children, timeout=20)[1]
    assert darkroom(own, "ps").returncode == 3


def test_cache_shows_what_is_where_and_steers_it(cluster: object, environment: dict[str, str], tmp_path: Path) -> None:
    darkroom(environment, "run", "a ring", "-o", str(tmp_path / "r.png"), "--steps", "2")

    def facts() -> dict[str, Any]:
        done = darkroom(environment, "cache", "describe", "--json")
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def until(holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        for _ in range(20):
            if holds(found := facts()):
                return found
            time.sleep(1)
        raise AssertionError(found)

    described = until(lambda found: any(model["model_id"] == "shapes" for model in found["models"]))
    assert described["leader_id"] == described["manager_id"] != ""
    (denoiser,) = [name for name in described["replicas"] if name.startswith("denoiser")]
    assert {"device", "host"} <= described["replicas"][denoiser]["shapes"].keys()
    assert darkroom(environment, "cache", "pin", "shapes").returncode == 0
    until(lambda found: {"replica_id": denoiser, "model_id": "shapes"} in found["keeps"])
    shown = darkroom(environment, "cache", "describe").stdout
    assert "leads in term" in shown
    assert "hot" in shown
    assert darkroom(environment, "cache", "unpin", "shapes").returncode == 0
    until(lambda found: not found["keeps"])
    assert darkroom(environment, "cache", "drop", "shapes", "--replica", denoiser).returncode == 0
    until(lambda found: "shapes" not in found["replicas"][denoiser])
    assert darkroom(environment, "cache", "prefetch", "shapes", "--stage", "denoiser").returncode == 0
    until(lambda found: "device" in found["replicas"][denoiser].get("shapes", {}))
    refused = darkroom(environment, "cache", "pin", "nobody")
    assert refused.returncode == 2
    assert "MODEL_NOT_FOUND" in refused.stderr
