# SPDX-License-Identifier: Apache-2.0
"""vLLM's own answer to load, tuned as well as rows allow: the best chain length of every batch size."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable

from heterospec_vllm.bench.rows import Row
from heterospec_vllm.bench.spec import PLAIN, system_of


def schedule_of(rows: Iterable[Row], most: int) -> list[tuple[int, int, int]]:
    """``num_speculative_tokens_per_batch_size`` from the steady cells of a folder.

    For every concurrency the ``eagle3`` chain (or plain decoding, 0) of the best geometric mean over the cells that
    all of them have; a batch size between two measured ones takes the nearer one's. ``most``: the largest batch.
    Raises ValueError where no chain was measured, or none is ever the best.
    """
    speeds: dict[int, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    by_cell: dict[tuple, list[float]] = defaultdict(list)
    for row in rows:
        k = _chain_length(row.system)
        if k is None or row.cell.load != "steady" or row.tokens_per_second is None:
            continue
        by_cell[row.cell, k].append(row.tokens_per_second)
    for (cell, k), values in by_cell.items():
        speeds[cell.concurrency][k].append(statistics.median(values))
    means = {
        size: {k: statistics.geometric_mean(values) for k, values in of.items()}
        for size, of in sorted(speeds.items())
    }
    best = {size: max(of, key=of.__getitem__) for size, of in means.items()}
    if not any(best.values()):
        raise ValueError(
            "eagle3 tuned: needs measured rows of `eagle3 k=N` that beat plain at some concurrency, "
            "or a `schedule` in the spec"
        )
    return _ranges(best, most)


def _chain_length(system: str) -> int | None:
    """k of an ``eagle3`` chain, 0 of plain decoding, None of all others."""
    if system == PLAIN:
        return 0
    if not system.startswith("eagle3 k="):
        return None
    config = system_of(system).speculative_config
    assert config is not None
    return int(config["num_speculative_tokens"])


def _ranges(best: dict[int, int], most: int) -> list[tuple[int, int, int]]:
    sizes = list(best)
    ranges = []
    first = 1
    for size, after in zip(sizes, [*sizes[1:], None], strict=True):
        last = most if after is None else (size + after) // 2
        last = min(last, most)
        if first <= last:
            ranges.append((first, last, best[size]))
        first = last + 1
    return ranges
