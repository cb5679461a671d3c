# SPDX-License-Identifier: Apache-2.0
"""A policy fed with random numbers: whatever it decides, the answers must be the target's.

It ranks nodes at random (connected, as every policy must), expands random nodes, verifies random prefixes, budgets of
0 included, switches drafting off and on between steps, for all requests or for a few, and leaves requests unread.
"""

from __future__ import annotations

import numpy as np

from heterospec_vllm.policy.base import Batch, DraftPolicy, FixedPlan, Level
from heterospec_vllm.policy.decisions import TreeShape


class RandomPlan(FixedPlan):
    def __init__(self, batch: Batch, shape: TreeShape, rng: np.random.Generator) -> None:
        super().__init__(batch, shape)
        self._rng = rng

    def survivals(self, depth, log_probs, strata, parent_survivals):
        random = self._rng.uniform(0.05, 1.0, log_probs.shape) * parent_survivals
        return np.where(log_probs > -np.inf, random, 0.0)

    def expand(self, level: Level):
        if level.depth >= self.shape.max_depth:
            return np.zeros(level.log_probs.shape, dtype=np.bool_)
        return (self._rng.random(level.log_probs.shape) < 0.4) & (level.survivals > 0)

    def propose(self, survivals, draft_seconds):
        most = np.minimum(self.batch.limits, (survivals > 0).sum(axis=1))
        return self._rng.integers(0, most + 1)

    def keep(self, survivals, num_nodes, other_tokens, num_reqs, context):
        return self._rng.integers(0, num_nodes + 1)


class RandomPolicy(DraftPolicy):
    learns = True

    def __init__(self, shape: TreeShape, seed: int = 0) -> None:
        super().__init__(shape)
        self._rng = np.random.default_rng(seed)

    def scope(self, num_reqs, context):
        return self._rng.choice(["all", "all", "all", "probe", "none"])

    def is_worth_reading(self, num_unread, tokens_left, num_reqs, context):
        return self._rng.random(num_unread.size) < 0.8

    def plan(self, batch: Batch, scope="all"):
        return RandomPlan(batch, self.shape, self._rng)


def install(
    worker,
    num_nodes: int = 12,
    max_depth: int = 4,
    top_k: int = 4,
    seed: int = 0,
    kept_bytes: int = 2**28,
) -> None:
    """Give the engine of this process the random policy (through ``LLM.collective_rpc``).

    kept_bytes: of the aux hidden states kept for later; with little room the head's contexts begin late.
    """
    controller = worker.model_runner.controller
    controller.policy = RandomPolicy(TreeShape(num_nodes, max_depth, top_k), seed)
    controller.drafter.reader.progress._max_bytes = kept_bytes
