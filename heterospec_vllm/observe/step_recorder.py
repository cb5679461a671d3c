# SPDX-License-Identifier: Apache-2.0
"""Notes the drafts of one request, step by step, and how they were walked."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from heterospec_vllm.tree.pool import CandidatePool
from heterospec_vllm.tree.trees import DraftTrees
from heterospec_vllm.verify.walk import Walk

MOST_NODES = 200  # candidates kept of a step


@dataclass
class StepRecorder:
    """Notes the drafts of the first request of a batch and how they were walked."""

    steps: list[dict[str, Any]] = field(default_factory=list)
    _drafted: dict[str, Any] | None = None

    def drafted(
        self, root: int, pool: CandidatePool, price: float, node_seconds: float, seconds: float
    ) -> None:
        """A draft of request 0: ``root`` is the token it continues; price in tokens per second."""
        if self._drafted is not None:  # nothing of the last draft was verified
            self.steps.append({**self._drafted, "verified": [], "accepted": []})
        order = pool.ranked(MOST_NODES).columns[0]
        order = np.sort(order[pool.survivals[0, order] > 0])
        self._drafted = {
            "root": root,
            "columns": order.tolist(),
            **{
                name: getattr(pool, name)[0, order].tolist()
                for name in ("tokens", "survivals", "entropies", "strata", "parents", "ranks")
            },
            "num_drafted": int((pool.survivals[0] > 0).sum()),
            "price": price,
            "node_seconds": node_seconds,
            "seconds": seconds,
        }

    def walked(self, trees: DraftTrees, walked: Walk | None) -> None:
        """What was verified of the last draft, and the path that was accepted."""
        if self._drafted is None:
            return
        count = int(trees.num_nodes[0])
        path = [] if walked is None else [int(row) for row in walked.rows[0] if row > 0]
        self._drafted["verified"] = _paths(trees, range(1, count + 1))
        self._drafted["accepted"] = _paths(trees, path)
        self.steps.append(self._drafted)
        self._drafted = None


def _paths(trees: DraftTrees, rows: Any) -> list[list[int]]:
    """The tokens from the root to each row: names a node whatever its place in the pool."""
    found = []
    for row in rows:
        path: list[int] = []
        while row > 0:
            path.append(int(trees.tokens[0, row - 1]))
            row = int(trees.parents[0, row])
        found.append(path[::-1])
    return found
