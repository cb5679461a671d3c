# SPDX-License-Identifier: Apache-2.0
"""Counters of what the engine drafted, verified and accepted, and of where its time went.

Plain numbers, filled by the runner; read by RPC, and by Prometheus (``metrics_folder.py``).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, fields
from typing import Any

from heterospec_vllm.policy.strata import NUM_STRATA
from heterospec_vllm.tree.outcomes import tally
from heterospec_vllm.tree.trees import DraftTrees
from heterospec_vllm.verify.walk import Walk

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
    late_contexts: int = 0  # requests of which the head read only the later tokens
    unread_requests: int = 0  # requests and steps in which reading the request was not worth it
    seconds: dict[str, float] = field(  # of steps, by part; the parts add up to the step
        default_factory=lambda: dict.fromkeys(STEP_PARTS, 0.0)
    )
    seconds_off: float = 0.0  # of steps with requests in which speculation was switched off
    budget: int = 0  # gauge: nodes that the last step verified
    price_of_time: float = 0.0  # gauge: tokens that a second was worth in the last draft
    nothing_accepted: int = 0  # gauge: 1 while next to no draft node is accepted
    expected_gain: float = 0.0  # gauge: rate with speculation over that of plain decoding

    def record_walk(self, trees: DraftTrees, walked: Walk, num_moves: int) -> None:
        by_stratum, by_depth, others, num_trees, branches = tally(
            trees.parents,
            trees.depths,
            trees.ranks,
            trees.num_nodes,
            trees.strata,
            walked.rows,
            NUM_STRATA,
        )
        self.eligible_steps += 1
        self.tree_steps += branches
        self.drafted_trees += num_trees
        self.verified_nodes += int(trees.num_nodes.sum())
        accepted = by_depth.tolist()
        self.accepted_nodes += sum(accepted)
        self.accepted_non_first_child += others
        self.max_verified_depth = max(self.max_verified_depth, trees.max_depth)
        deepest = max((depth for depth, n in enumerate(accepted) if n), default=0)
        self.max_accepted_depth = max(self.max_accepted_depth, deepest)
        for depth, count in enumerate(accepted[1:], 1):
            self.accepted_per_depth[depth] += count
        for counter, counts in zip(
            (self.nodes_by_stratum, self.trees_by_stratum, self.depth_by_stratum),
            by_stratum.tolist(),
            strict=True,
        ):
            for stratum, count in enumerate(counts):
                if count:
                    counter[stratum] += count
        self.moved_kv_rows += num_moves
        self.steps_compacted_in_place += num_moves == 0

    def as_dict(self) -> dict[str, Any]:
        """A copy that JSON can hold (as JSON its integer keys become text)."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        copied = {k: dict(v) if isinstance(v, dict) else v for k, v in values.items()}
        copied["fallbacks"] = {reason: n for reason, n in self.fallbacks.items() if n}
        return copied
