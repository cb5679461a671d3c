# SPDX-License-Identifier: Apache-2.0
"""Counters of what the engine drafted, verified and accepted, and of where its time went.

Plain numbers, filled by the runner; read by RPC, and by Prometheus through ``metrics_file``.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from heterospec_vllm.tree import DraftTrees, Ints
from heterospec_vllm.verify import Walk

# What the time of a step is split into: the target's forward pass, the head's passes, deciding the trees, the walk
# with the sampler, and all else.
STEP_PARTS = ("target", "draft", "policy", "sample", "rest")


@dataclass
class StepCounters:
    """Sums since the engine started or the counters were last reset."""

    steps: int = 0  # target steps
    eligible_steps: int = 0  # steps in which some request had been drafted for
    tree_steps: int = 0  # eligible steps in which some draft was a tree rather than a chain
    draft_steps: int = 0  # steps after which the head drafted
    drafted_trees: int = 0  # requests' drafts that were verified
    verified_nodes: int = 0
    accepted_nodes: int = 0
    accepted_non_first_child: int = (
        0  # accepted nodes that were not the likeliest child of their parent
    )
    max_verified_depth: int = 0
    max_accepted_depth: int = 0
    moved_kv_rows: int = 0
    steps_compacted_in_place: int = 0  # eligible steps in which no key or value had to move
    dropped_drafts: int = 0  # scheduled drafts that matched no tree (padding, resumed requests)
    accepted_per_depth: Counter[int] = field(default_factory=Counter)
    fallbacks: Counter[str] = field(default_factory=Counter)  # requests decoded plainly, by reason
    head_passes: int = 0  # forward passes of the head: the first one of a step and one a level
    drafted_nodes: int = 0  # candidates the head proposed; the policy verifies some of them
    nodes_by_stratum: Counter[int] = field(default_factory=Counter)  # verified nodes
    trees_by_stratum: Counter[int] = field(default_factory=Counter)  # verified trees
    depth_by_stratum: Counter[int] = field(default_factory=Counter)  # sum of their depths
    probes: int = 0  # steps that drafted only to measure, while speculation was switched off
    pauses: int = 0  # plain steps only to measure, while speculation was switched on
    caught_up_tokens: int = 0  # tokens the head read later than in the step that emitted them
    seconds: dict[str, float] = field(  # of steps, by part; the parts add up to the step
        default_factory=lambda: dict.fromkeys(STEP_PARTS, 0.0)
    )
    seconds_off: float = 0.0  # of steps with requests in which speculation was switched off
    budget: int = 0  # gauge: nodes that the last step allowed
    price_of_time: float = 0.0  # gauge: tokens per second that one second is worth

    def record_walk(self, trees: DraftTrees, walked: Walk, num_moves: int) -> None:
        self.eligible_steps += 1
        self.tree_steps += bool((~trees.is_chain).any())
        self.drafted_trees += int((trees.num_nodes > 0).sum())
        self.verified_nodes += int(trees.num_nodes.sum())
        accepted: Ints = walked.num_accepted
        self.accepted_nodes += int(accepted.sum())
        self.max_verified_depth = max(self.max_verified_depth, trees.max_depth)
        self.max_accepted_depth = max(self.max_accepted_depth, int(accepted.max(initial=0)))
        rows = np.maximum(walked.rows, 0)
        ranks = np.take_along_axis(trees.ranks, rows, axis=1)
        self.accepted_non_first_child += int(((walked.rows > 0) & (ranks > 0)).sum())
        self.accepted_per_depth.update(
            {depth: int(n) for depth, n in enumerate((walked.rows > 0).sum(axis=0)) if depth > 0}
        )
        self._record_strata(trees)
        self.moved_kv_rows += num_moves
        self.steps_compacted_in_place += num_moves == 0

    def _record_strata(self, trees: DraftTrees) -> None:
        """A tree's stratum is that of the end of its meta-path, which is laid out first."""
        width = trees.max_nodes
        if not width:
            return
        real = np.arange(width) < trees.num_nodes[:, None]
        on_path = np.logical_and.accumulate(trees.parents[:, 1:] == np.arange(width), axis=1)
        end = np.maximum((on_path & real).sum(axis=1) - 1, 0)
        has_tree = trees.num_nodes > 0
        tree_strata = trees.strata[np.arange(trees.num_reqs), end][has_tree]
        depths = trees.depths.max(axis=1)[has_tree]
        _add(self.nodes_by_stratum, np.bincount(trees.strata[real]))
        _add(self.trees_by_stratum, np.bincount(tree_strata))
        _add(self.depth_by_stratum, np.bincount(tree_strata, weights=depths))

    def as_dict(self) -> dict[str, Any]:
        """A copy that JSON can hold (as JSON its integer keys become text)."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        copied = {k: dict(v) if isinstance(v, dict) else v for k, v in values.items()}
        copied["fallbacks"] = {reason: n for reason, n in self.fallbacks.items() if n}
        return copied


def _add(counter: Counter[int], counts: Any) -> None:
    for stratum in np.flatnonzero(counts).tolist():
        counter[stratum] += int(counts[stratum])
