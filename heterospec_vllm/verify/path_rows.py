# SPDX-License-Identifier: Apache-2.0
"""Rows laid out so that each tree node stands behind its own path, as vLLM's kernels for chains read them.

Model Runner V2's kernels for penalties, bad words and thinking budgets take the rows before a row for its past. In a
tree these are often siblings. So a node's row is preceded by copies of its ancestors' rows, and only its own is kept
afterwards. Rows are copied only for requests whose rules look at the past.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from heterospec_vllm.arrays import NO_ROW, Bools, Ints
from heterospec_vllm.tree.trees import DraftTrees


@dataclass(frozen=True)
class PathRows:
    """A longer list of a step's rows of logits."""

    rows: Ints  # [num_path_rows] which row each one is
    local_pos: Ints  # [num_path_rows] how many rows of its path stand before it
    last: Ints  # [num_logits] where each row itself stands, its path before it

    @classmethod
    def of(
        cls,
        trees: DraftTrees,  # [num_reqs]
        follows: Bools,  # [num_reqs] whose rules look at the past
    ) -> PathRows:
        count = trees.num_nodes + 1
        first = np.cumsum(count) - count
        is_row = np.arange(trees.parents.shape[1]) < count[:, None]
        above = np.where(trees.parents >= 0, trees.parents + first[:, None], NO_ROW)[is_row]
        followed = np.repeat(follows, count)
        paths = [np.arange(above.size)]
        while True:
            current = paths[-1]
            parents = np.where((current >= 0) & followed, above[current], NO_ROW)
            if (parents < 0).all():
                break
            paths.append(parents)
        chains = np.stack(paths[::-1], axis=1)  # [num_logits, depth], the row itself last
        is_there = chains >= 0
        before = np.cumsum(is_there, axis=1) - 1
        return cls(chains[is_there], before[is_there], np.cumsum(is_there.sum(axis=1)) - 1)
