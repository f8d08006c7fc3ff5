"""What `make help` lists can be run: the benchmarks that the Makefile names are there."""

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def make(*arguments: str) -> str:
    """What make says; with -n, what it would run."""
    done = subprocess.run(["make", *arguments], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    return done.stdout


def test_the_targets_that_measure_are_listed() -> None:
    listed = {line.split()[0] for line in make("help").splitlines()}
    assert {"bench", "bench-store", "calibrate"} <= listed


@pytest.mark.parametrize("target", ["bench", "bench-store", "calibrate"])
def test_every_benchmark_that_a_target_names_exists(target: str) -> None:
    said = make("-n", target)
    named = set(re.findall(r"-m bench\.(\w+)", said))
    for names in re.findall(r"for name in ([\w ]+);", said):
        named.update(names.split())
    assert named
    assert all(importlib.util.find_spec(f"bench.{name}") for name in named)
    assert ("calibration" in named) == (target == "calibrate")
