# SPDX-License-Identifier: Apache-2.0
"""KV compaction: after the walk, move accepted rows that are not in place to the slots that follow the context."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from heterospec_vllm.arrays import Ints
from heterospec_vllm.compiled import compiled
from heterospec_vllm.verify.walk import Walk


@compiled("Tuple((i8[::1], i8[::1]))(i8[:,:], i8[:])")
def moves(
    rows,  # [num_reqs, max_emitted] visited rows of each tree, NO_ROW beyond
    root_rows,  # [num_reqs]
):
    """[num_moves] each: rows of the step that are not where their depth belongs, and where that is."""
    num_reqs, width = rows.shape
    sources = np.empty(rows.size, np.int64)
    targets = np.empty(rows.size, np.int64)
    count = 0
    for req in range(num_reqs):
        for depth in range(width):
            if rows[req, depth] > depth:
                sources[count] = root_rows[req] + rows[req, depth]
                targets[count] = root_rows[req] + depth
                count += 1
    return sources[:count], targets[:count]


@dataclass(frozen=True)
class KVMoves:
    """Token rows of the step whose keys and values move, in the order they must be carried out."""

    sources: Ints  # [num_moves] token row in the step
    targets: Ints  # [num_moves] token row whose slot receives it

    @property
    def num_moves(self) -> int:
        return self.sources.size


def plan_moves(
    walked: Walk,
    root_rows: Ints,  # [num_reqs] token row of each request's root in the step
) -> KVMoves:
    """Which accepted rows lie off their final place.

    The row visited at depth ``d`` belongs into the slot of row ``d``. Rows rise along a path and parents come
    first, so ``d <= rows[d]`` and a target never is a later source: moving request by request, depth by depth,
    needs no buffer.
    """
    return KVMoves(*moves(walked.rows, root_rows))
