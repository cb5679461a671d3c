# SPDX-License-Identifier: Apache-2.0
"""The ``paper`` policy: HeteroSpec's formulas as printed (papers: HeteroSpec 3.3)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from heterospec_vllm.arrays import Bools, Floats, Ints
from heterospec_vllm.config import MetaPathReading
from heterospec_vllm.policy.base import Batch, DraftPlan, DraftPolicy, FixedPlan, Level, Scope
from heterospec_vllm.policy.decisions import TreeShape

# HeteroSpec, section 3.3: the lowest three strata act.
PAPER_GAMMAS = (0.3, 0.6, 1.0)


@dataclass(frozen=True)
class PaperAction:
    """Depth and node budget of a request under HeteroSpec's formulas."""

    depths: Ints  # [num_reqs]
    num_nodes: Ints  # [num_reqs] drafted nodes, the root not counted


def paper_alpha(depth: int) -> int:
    """HeteroSpec's alpha: most levels that are added to the default depth."""
    return math.ceil(depth / 2)


def paper_action(
    strata: Ints,  # [num_reqs] stratum of the meta-path's entropy at the default depth
    *,
    depth: int,
    num_nodes: int,
    first_index: int = 0,
    alpha: int | None = None,
) -> PaperAction:
    """``d' = d + (alpha - i)`` and ``Top_N = gamma_i * N + (alpha - i)`` in the lowest three strata.

    ``alpha`` is ``ceil(depth / 2)`` unless given. ``first_index`` chooses the reading of ``i``: strata are numbered
    from 0 in the text and gammas from 1. The paper's N counts the root, ``num_nodes`` does not; ``gamma_i * N`` is
    rounded to the nearest.
    """
    alpha = paper_alpha(depth) if alpha is None else alpha
    acts = strata < len(PAPER_GAMMAS)
    extra = np.where(acts, np.maximum(alpha - (strata + first_index), 0), 0)
    gamma = np.asarray(PAPER_GAMMAS)[np.minimum(strata, len(PAPER_GAMMAS) - 1)]
    total = np.where(acts, np.floor(gamma * (num_nodes + 1) + 0.5 + 1e-9) + extra, num_nodes + 1)
    return PaperAction(depth + extra, np.maximum(total.astype(np.int64) - 1, 1))


class PaperPlan(FixedPlan):
    """The static tree, deeper and pruned where the meta-path's entropy is low."""

    follows_meta_path = True

    def __init__(self, batch: Batch, policy: PaperPolicy) -> None:
        super().__init__(batch, policy.shape)
        self.max_depth = policy.shape.max_depth + paper_alpha(policy.shape.max_depth)
        self.reading = policy.reading
        self._policy = policy
        self._action: PaperAction | None = None  # once a draft came as far as the default depth

    def expand(self, level: Level) -> Bools:
        """The strata are read once, at the default depth, for the whole draft."""
        if level.depth == self.shape.max_depth:
            self._action = paper_action(
                np.searchsorted(self._policy.edges, level.meta_entropies, side="left"),
                depth=self.shape.max_depth,
                num_nodes=self.shape.num_nodes,
                first_index=self._policy.first_index,
            )
        beam = self.best_of(level)
        if self._action is None:
            return beam
        return beam & (level.depth < self._action.depths[:, None])

    def propose(self, survivals: Floats, draft_seconds: float) -> Ints:
        if self._action is None:  # a head that yields NaN
            return super().propose(survivals, draft_seconds)
        most = self._policy.max_nodes
        return np.minimum(self.within(survivals, most), self._action.num_nodes)


class PaperPolicy(DraftPolicy):
    """HeteroSpec as printed."""

    def __init__(
        self,
        shape: TreeShape,
        edges: tuple[
            float, ...
        ],  # rising cut points of the meta-path's entropy at the default depth
        *,
        max_nodes: int,
        first_index: int = 0,
        reading: MetaPathReading = "A",
    ) -> None:
        super().__init__(shape)
        self.edges = np.asarray(edges)
        self.max_nodes = max_nodes
        self.first_index = first_index
        self.reading = reading

    def plan(self, batch: Batch, scope: Scope = "all") -> DraftPlan:
        return PaperPlan(batch, self)
