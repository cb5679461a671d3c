# SPDX-License-Identifier: Apache-2.0
"""Sample-then-match verification: walk a draft tree with the target's own samples.

At every visited row the target emits the token it would emit there without speculation (greedy: argmax). If a
child carries that token, the walk goes there; otherwise it ends. The tokens are the target's, the tree only says
how many of them one forward pass yields, so the output distribution is the target's for any tree that was chosen
without looking at this step's target data (docs/design.md, "Why the answers do not change").

Where every row's token is its argmax or a plain sample, ``kernels/cpu/walk.py`` does the same in one call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from heterospec_vllm.arrays import NO_ROW, Bools, Ints
from heterospec_vllm.tree.trees import DraftTrees

# (requests [num_active], their rows [num_active], depth) -> the target's tokens at those rows [num_active]
SampleRows = Callable[[Ints, Ints, int], Ints]
# (requests [num_active], their tokens so far [num_active, depth + 1]) -> which of them stop there [num_active]
HaveStopped = Callable[[Ints, Ints], Bools]


@dataclass(frozen=True)
class Walk:
    """What one step's walk emitted: column ``d`` is the row visited at depth ``d`` and the token emitted there."""

    rows: Ints  # [num_reqs, max_emitted] visited rows, NO_ROW beyond num_emitted
    tokens: Ints  # [num_reqs, max_emitted] emitted tokens, NO_ROW beyond num_emitted
    num_emitted: Ints  # [num_reqs] accepted draft tokens + 1
    # [num_reqs] which ended at a stop though a child carried the token; None: no one
    stopped: Bools | None = None

    @property
    def num_accepted(self) -> Ints:
        """[num_reqs] accepted draft tokens."""
        return self.num_emitted - 1

    def cut(
        self,
        num_kept: Ints,  # [num_reqs]
    ) -> Walk:
        """The first tokens of each request."""
        stopped = num_kept < self.num_emitted
        if not stopped.any():
            return self
        kept = np.arange(self.rows.shape[1]) < num_kept[:, None]
        rows, tokens = (np.where(kept, values, NO_ROW) for values in (self.rows, self.tokens))
        return Walk(rows, tokens, num_kept, stopped)


def walk(trees: DraftTrees, sample: SampleRows, have_stopped: HaveStopped | None = None) -> Walk:
    """Walk every tree of the batch, one depth at a time; ``sample`` is asked for visited rows only."""
    num_reqs = trees.num_reqs
    rows = np.full((num_reqs, trees.max_depth + 1), NO_ROW)
    tokens = np.full_like(rows, NO_ROW)
    num_emitted = np.zeros(num_reqs, dtype=np.int64)
    active = np.arange(num_reqs)
    current = np.zeros(num_reqs, dtype=np.int64)
    stopped = np.zeros(num_reqs, dtype=np.bool_)
    depth = 0
    while active.size:
        emitted = sample(active, current, depth)
        rows[active, depth] = current
        tokens[active, depth] = emitted
        num_emitted[active] += 1
        child = trees.children_matching(active, current, emitted)
        found = child >= 0
        if have_stopped is not None:
            stopped[active] = found & have_stopped(active, tokens[active, : depth + 1])
            found &= ~stopped[active]
        active, current = active[found], child[found]
        depth += 1
    return Walk(rows, tokens, num_emitted, stopped)
