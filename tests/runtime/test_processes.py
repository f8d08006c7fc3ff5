"""Child processes and their logs."""

import sys
from functools import partial
from pathlib import Path

from darkroom.runtime.processes import Child, execute


def executed(log: Path, program: str) -> Child:
    return Child("one", log, partial(execute, [sys.executable, "-c", program], log))


async def test_a_child_whose_log_cannot_be_opened_starts_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("no folder")
    said = tmp_path / "said"
    child = executed(tmp_path / "logs" / "one.log", f"open({str(said)!r}, 'w').write('x')")
    await child.start()
    assert child.process is not None
    assert await child.process.wait() == 0
    assert said.exists()
    assert "could not be opened" in child.tail()


async def test_a_child_that_starts_again_adds_to_its_log(tmp_path: Path) -> None:
    child = executed(tmp_path / "logs" / "one.log", "print('here')")
    for _ in range(2):
        await child.start()
        assert child.process is not None
        assert await child.process.wait() == 0
    assert child.tail() == "here\nhere"
