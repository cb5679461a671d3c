# SPDX-License-Identifier: Apache-2.0
"""Progress of long work: a bar on a terminal, a line now and then in a file or a pipe."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from time import monotonic
from typing import TypeVar

from rich.console import Console
from rich.progress import track

Item = TypeVar("Item")
SECONDS_A_LINE = 20.0


def watched(items: Sequence[Item], description: str, console: Console) -> Iterator[Item]:
    """The items, while the console shows how many of them are done."""
    if console.is_terminal:
        yield from track(items, description=description, console=console)
        return
    start = shown = monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now = monotonic()
        if done == len(items) or now - shown >= SECONDS_A_LINE:
            shown = now
            console.print(f"{description}: {done} of {len(items)}, {now - start:.0f} s")
