"""One JSON line per event on standard error. Prompts, images and keys are never logged; ids and counts are.

The rule: a log that cannot be written to, because its disk is full, stops nothing. Lines are lost, and counted.
"""

import io
import json
import logging
import os
import sys
import threading
from typing import Literal, TextIO, cast

import structlog
from structlog.typing import Processor

LogLevel = Literal["debug", "info", "warning", "error"]


class Lines(io.TextIOBase):
    """A file to write lines to. Those that it does not take are dropped; the next that it takes says how many."""

    def __init__(self, descriptor: int) -> None:
        """`descriptor` stays open."""
        self._descriptor, self._lock = descriptor, threading.Lock()
        self._dropped_count = 0
        self._is_torn = False

    def write(self, text: str, /) -> int:
        """Takes whole lines. Raises nothing."""
        with self._lock:
            if self._dropped_count and self._put(_dropped(self._dropped_count)):
                self._dropped_count = 0
            if self._dropped_count or not self._put(text):
                self._dropped_count += 1
        return len(text)

    def _put(self, text: str) -> bool:
        """Whether all of it was written, after the end of whatever was torn before."""
        left = ("\n" * self._is_torn + text).encode(errors="backslashreplace")
        try:
            while left:
                left = left[os.write(self._descriptor, left) :]
                self._is_torn = bool(left)
        except OSError:
            return False
        return True


def _dropped(count: int) -> str:
    return json.dumps({"event": "log_lines_dropped", "count": count, "level": "error"}) + "\n"


def configure_logs(service: str, replica_id: str, *, level: LogLevel = "info") -> None:
    """Sends this process's logs, and those of its libraries, to standard error as JSON."""
    number, lines = logging.getLevelNamesMapping()[level.upper()], Lines(sys.stderr.fileno())
    shared: list[Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            *shared,
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.WriteLoggerFactory(file=cast("TextIO", lines)),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(service=service, replica_id=replica_id)
    handler = logging.StreamHandler(lines)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                structlog.processors.JSONRenderer(),
            ],
            foreign_pre_chain=[structlog.contextvars.merge_contextvars, *shared],
        )
    )
    logging.basicConfig(level=max(number, logging.WARNING), handlers=[handler], force=True)
