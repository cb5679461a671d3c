# SPDX-License-Identifier: Apache-2.0
"""The ``paper`` policy: HeteroSpec's formulas as printed (papers: HeteroSpec 3.3)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from heterospec_vllm.arrays import Bools, Floats, Ints
from heterospec_vllm.config import MetaPathReading
from heterospec_vllm.policy.base import Batch, DraftPolicy, Level
from heterospec_vllm.policy.decisions import TreeShape


class PaperPolicy(DraftPolicy):
    """HeteroSpec as printed: the static tree, deeper and pruned where the meta-path's entropy is low."""

    follows_meta_path = True

    def __init__(
        self,
        shape: TreeShape,
        edges: tuple[float, ...],
        *,
        max_nodes: int,
        first_index: int = 0,
        reading: MetaPathReading = "A",
    ) -> None:
        super().__init__(shape)
        self._edges = np.asarray(edges)
        self._first_index = first_index
        self._max_nodes = max_nodes
        self.reading = reading
        self.max_depth = shape.max_depth + paper_alpha(shape.max_depth)
        self._action: PaperAction | None = None

    def expand(self, batch: Batch, level: Level) -> Bools:
        """The strata are read once, at the default depth, for the whole draft."""
        if level.depth == 1:
            self._action = None
        if level.depth == self.shape.max_depth:
            strata = np.searchsorted(self._edges, level.meta_entropies, side="left")
            self._action = paper_action(
                strata,
                depth=self.shape.max_depth,
                num_nodes=self.shape.num_nodes,
                first_index=self._first_index,
            )
        beam = self.best_of(level)
        if self._action is None:
            return beam
        return beam & (level.depth < self._action.depths[:, None])

    def propose(self, batch: Batch, survivals: Floats, draft_seconds: float) -> Ints:
        if self._action is None:
            # No draft came as far as the default depth: the head yields NaN.
            return super().propose(batch, survivals, draft_seconds)
        return np.minimum(self.within(batch, survivals, self._max_nodes), self._action.num_nodes)


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
