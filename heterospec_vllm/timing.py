# SPDX-License-Identifier: Apache-2.0
"""Where a step's time goes: named spans, off by default, summed over steps."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext


class StepClock:
    """Sums the seconds spent in named spans while it is on.

    A span may lie inside another: `attention` is part of `target forward` and of the head's passes.
    """

    def __init__(self) -> None:
        self.on = False
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)

    def span(self, name: str) -> AbstractContextManager[None]:
        return self._measure(name) if self.on else _OFF

    @contextmanager
    def _measure(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start
            self.calls[name] += 1

    def restart(self, on: bool) -> dict[str, tuple[float, int]]:
        """Switch on or off with empty sums; returns what was measured: seconds and calls by span."""
        measured = {name: (self.seconds[name], self.calls[name]) for name in self.seconds}
        self.on = on
        self.seconds.clear()
        self.calls.clear()
        return measured


_OFF = nullcontext()
# One engine runs in a worker process, and spans lie in modules that do not know each other.
CLOCK = StepClock()
