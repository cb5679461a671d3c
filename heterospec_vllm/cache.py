# SPDX-License-Identifier: Apache-2.0
"""KV compaction: after the walk, move accepted rows that are not in place to the slots that follow the context."""

from __future__ import annotations

from dataclasses import dataclass

from heterospec_vllm import row_loops
from heterospec_vllm.tree import Ints
from heterospec_vllm.verify import Walk


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
    return KVMoves(*row_loops.moves(walked.rows, root_rows))
