"""Processes forked by one that has imported everything."""

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest
import pytest_asyncio

from darkroom.runtime.forking import Zygote
from darkroom.runtime.processes import Child, ChildFailed, Supervisor

PROGRAM = """
import os, sys, time
import slow
print("imported at", slow.AT, flush=True)
print("argv", *sys.argv[1:], "colour", os.environ.get("COLOUR"), "threads", os.environ["OMP_NUM_THREADS"], flush=True)
if __name__ == "__main__":
    if "wait" in sys.argv:
        time.sleep(600)
    sys.exit(int(sys.argv[1]))
"""
THREADS = {"OMP_NUM_THREADS": "1"}


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a program lies that imports something slow."""
    folder = tmp_path / "programs"
    (folder / "program").mkdir(parents=True)
    (folder / "slow.py").write_text("import time\nAT = time.monotonic_ns()\n")
    (folder / "program" / "__init__.py").touch()
    (folder / "program" / "__main__.py").write_text(PROGRAM)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), *sys.path]))
    return folder


@pytest_asyncio.fixture
async def zygote(programs: Path, tmp_path: Path) -> AsyncIterator[Zygote]:
    made = Zygote(["program"], tmp_path / "zygote.log", THREADS)
    yield made
    await made.stop()


async def test_each_has_output_arguments_and_environment_of_its_own_and_imports_nothing(
    zygote: Zygote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = []
    for name, code in (("one", 0), ("two", 3)):
        monkeypatch.setenv("COLOUR", name)
        process = await zygote.fork(name, "program", [str(code), name], tmp_path / f"{name}.log")
        assert await process.wait() == process.returncode == code
        said.append((tmp_path / f"{name}.log").read_text().splitlines())
    assert said[0][0] == said[1][0], "they were imported once"
    assert [lines[1] for lines in said] == [
        "argv 0 one colour one threads 1",
        "argv 3 two colour two threads 1",
    ]


async def test_one_that_is_killed_says_so_and_no_other_ends(zygote: Zygote, tmp_path: Path) -> None:
    first, second = [
        await zygote.fork(name, "program", ["0", "wait"], tmp_path / f"{name}.log") for name in ("one", "two")
    ]
    async with asyncio.timeout(10):
        while not (tmp_path / "one.log").is_file() or not (tmp_path / "one.log").read_text():
            await asyncio.sleep(0.01)
    assert Path(f"/proc/{first.pid}/comm").read_text().strip() == "one"
    assert os.getsid(first.pid) == first.pid
    first.kill()
    assert await first.wait() == -signal.SIGKILL
    first.terminate()  # nothing left to end
    assert second.returncode is None
    second.terminate()
    assert await second.wait() == -signal.SIGTERM


async def test_one_that_ends_before_its_start_was_noticed_has_ended(zygote: Zygote, tmp_path: Path) -> None:
    await zygote.fork("first", "program", ["0"], tmp_path / "first.log")
    starting = asyncio.create_task(zygote.fork("one", "program", ["6"], tmp_path / "one.log"))
    await asyncio.sleep(0.01)
    time.sleep(0.5)  # noqa: ASYNC251 - so that the loop hears of both at once
    async with asyncio.timeout(10):
        assert await (await starting).wait() == 6
        assert await (await zygote.fork("two", "program", ["7"], tmp_path / "two.log")).wait() == 7


async def test_one_that_nobody_waits_for_any_more_is_killed_and_the_next_gets_its_own(
    zygote: Zygote, tmp_path: Path
) -> None:
    await zygote.fork("first", "program", ["0"], tmp_path / "first.log")
    starting = asyncio.create_task(zygote.fork("one", "program", ["0", "wait"], tmp_path / "one.log"))
    await asyncio.sleep(0)
    starting.cancel()
    async with asyncio.timeout(10):
        second = await zygote.fork("two", "program", ["8"], tmp_path / "two.log")
        assert await second.wait() == 8
        while zygote._forked:
            await asyncio.sleep(0.01)


async def test_a_supervisor_tries_again_while_nothing_can_be_forked(
    zygote: Zygote, programs: Path, tmp_path: Path
) -> None:
    log, supervisor = tmp_path / "one.log", Supervisor()
    child = Child("one", log, partial(zygote.fork, "one", "program", ["0", "wait"], log))
    await supervisor.add(child)
    (programs / "slow.py").write_text("raise RuntimeError('no memory now')")
    assert child.pid is not None
    os.kill(int(Path(f"/proc/{child.pid}/stat").read_text().split()[3]), signal.SIGKILL)
    async with asyncio.timeout(20):
        while "no memory now" not in (tmp_path / "zygote.log").read_text():
            await asyncio.sleep(0.05)
        (programs / "slow.py").write_text("AT = 0\n")
        while child.start_count < 2:
            await asyncio.sleep(0.05)
    await supervisor.stop()


async def test_what_a_zygote_forked_ends_with_it_and_the_next_one_forks_again(zygote: Zygote, tmp_path: Path) -> None:
    first = await zygote.fork("one", "program", ["0", "wait"], tmp_path / "one.log")
    os.kill(int(Path(f"/proc/{first.pid}/stat").read_text().split()[3]), signal.SIGKILL)
    async with asyncio.timeout(10):
        assert await first.wait() == -signal.SIGKILL
        second = await zygote.fork("two", "program", ["5"], tmp_path / "two.log")
        assert await second.wait() == 5


async def test_what_cannot_be_imported_is_said(programs: Path, tmp_path: Path) -> None:
    (programs / "slow.py").write_text("raise RuntimeError('no such accelerator')")
    zygote = Zygote(["program"], tmp_path / "zygote.log", THREADS)
    with pytest.raises(ChildFailed, match="no such accelerator"):
        await zygote.fork("one", "program", ["0"], tmp_path / "one.log")
    await zygote.stop()


async def test_a_log_that_cannot_be_opened_stops_nothing(zygote: Zygote, tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("no folder")
    process = await zygote.fork("one", "program", ["4"], tmp_path / "logs" / "one.log")
    assert await process.wait() == 4
