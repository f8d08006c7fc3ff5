"""Times calls of an object's own methods in place, for plain pipelines and for networks inside the executor alike."""

import functools
import time
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Stopwatch:
    """Seconds and calls by name since the last `read`."""

    seconds: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def watch(self, owner: Any, method: str, name: str) -> None:
        """Times every call of `owner.method` from now on: a microsecond each."""
        real = getattr(owner, method)

        @functools.wraps(real)
        def timed(*args: Any, **kwargs: Any) -> Any:
            start_s = time.perf_counter()
            try:
                return real(*args, **kwargs)
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start_s
                self.counts[name] = self.counts.get(name, 0) + 1

        setattr(owner, method, timed)

    def read(self) -> dict[str, float]:
        """Seconds as `NAME_s` and calls as `NAME_count`, and starts anew."""
        read = {f"{name}_s": value for name, value in self.seconds.items()}
        read |= {f"{name}_count": float(value) for name, value in self.counts.items()}
        self.seconds.clear()
        self.counts.clear()
        return read
