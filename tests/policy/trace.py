"""Golden traces: events, a line of four dashes, and the decisions that these events must lead to.

A line of events is a verb and its words, `name=value` for named ones; `#` starts a comment.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

GOLDEN = Path(__file__).parent / "golden"


@dataclass(frozen=True, slots=True)
class TraceEvent:
    """One line above the dashes."""

    verb: str
    words: tuple[str, ...]
    named: dict[str, str]


def traces(policy: str) -> list[str]:
    """The names of a policy's golden traces."""
    found = sorted(path.stem for path in GOLDEN.glob(f"{policy}_*.txt"))
    assert found, f"no golden trace of {policy}"
    return found


def check_trace(name: str, replay: Callable[[Iterator[TraceEvent]], Iterator[str]]) -> None:
    """Replays a trace and compares the decisions with those written down."""
    events, expected = (GOLDEN / f"{name}.txt").read_text().split("----\n")
    assert list(replay(_events(events))) == expected.splitlines()


def _events(text: str) -> Iterator[TraceEvent]:
    for line in text.splitlines():
        verb, *words = line.partition("#")[0].split() or [""]
        if verb:
            named = dict(word.split("=", 1) for word in words if "=" in word)
            yield TraceEvent(verb, tuple(word for word in words if "=" not in word), named)
