"""A measured process beside the cluster: one line of JSON in, one line of JSON out, asleep in between."""

import argparse
import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

from bench.report import FOLDER

Question = dict[str, Any]
Answer = dict[str, Any]
_START_TIMEOUT_S = 120.0
_ANSWER_TIMEOUT_S = 300.0


class WorkerFailed(Exception):
    """A worker ended before it answered."""


class Worker:
    """The asking side of a worker process."""

    def __init__(self, name: str, process: asyncio.subprocess.Process) -> None:
        self._name, self._process = name, process

    async def ask(self, timeout_s: float = _ANSWER_TIMEOUT_S, **question: Any) -> Answer:
        """The answer to one question. Raises WorkerFailed or TimeoutError."""
        reader, writer = self._process.stdout, self._process.stdin
        assert reader is not None
        assert writer is not None
        writer.write(json.dumps(question).encode() + b"\n")
        async with asyncio.timeout(timeout_s):
            line = await reader.readline()
        if not line:
            raise WorkerFailed(f"{self._name} ended; {_log(self._name)} says why")
        answer: Answer = json.loads(line)
        return answer


@contextlib.asynccontextmanager
async def worker(name: str, module: str, folder: Path, *, device: str, threads: int) -> AsyncGenerator[Worker, None]:
    """Runs `python -m MODULE` over the model in `folder`, ready for questions; ends it on exit."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    own = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    with open(_log(name), "wb") as log:  # noqa: ASYNC230, PTH123 - nothing else waits for this loop yet
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            module,
            *("--folder", str(folder), "--device", device, "--threads", str(threads)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
            env={**os.environ, **own},
        )
    made = Worker(name, process)
    try:
        await made.ask(_START_TIMEOUT_S)
        yield made
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def worker_flags(description: str | None) -> argparse.Namespace:
    """What `worker` passes on: `folder`, `device` and `threads`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--threads", type=int, required=True)
    return parser.parse_args()


def answer_lines(answer: Callable[[Question], Answer]) -> None:
    """The answering side: returns when the asking side is gone. An empty question asks whether it is ready."""
    out, sys.stdout = sys.stdout, sys.stderr  # what libraries print must not look like an answer
    for line in sys.stdin:
        question = json.loads(line)
        out.write(json.dumps(answer(question) if question else {}) + "\n")
        out.flush()


def _log(name: str) -> str:
    return str(FOLDER / f"{name}.log")
