# SPDX-License-Identifier: Apache-2.0
"""Strata: intervals of cumulative path entropy, cut by a regression tree (papers: HeteroSpec 3.2)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from heterospec_vllm.arrays import Floats, Ints

CART_DEPTH = 3
NUM_STRATA = 2**CART_DEPTH


@dataclass(frozen=True)
class Strata:
    """``edges[d - 1]`` are the rising cut points for paths of ``d`` tokens; deeper paths use the last entry.

    A path with cumulative entropy ``h`` lies in stratum ``i`` where ``edges[i - 1] < h <= edges[i]``: stratum 0 is
    the least uncertain.
    """

    edges: tuple[tuple[float, ...], ...]

    def cuts(self, depth: int) -> Floats:
        """[num_cuts] the cut points for paths of ``depth`` tokens."""
        return self._cuts[min(depth, len(self._cuts)) - 1]

    @cached_property
    def _cuts(self) -> list[Floats]:
        return [np.asarray(edges, dtype=np.float64) for edges in self.edges]

    def of(
        self,
        depth: int,
        entropies: Floats,  # [...] cumulative entropy of paths of ``depth`` tokens
    ) -> Ints:
        """[...] stratum of each path."""
        return np.searchsorted(self.cuts(depth), entropies, side="left")


# Before anything is calibrated: equal steps of the mean entropy per token, up to that of four even choices.
DEFAULT_STRATA = Strata(
    tuple(
        tuple(float(x) * depth for x in np.linspace(0.17, 1.2, NUM_STRATA - 1))
        for depth in range(1, 9)
    )
)


def fit_edges(
    entropies: Floats,  # [num_samples] cumulative entropy
    outcome: Floats,  # [num_samples] what the strata should separate
    min_samples: int = 50,
) -> tuple[float, ...]:
    """The cut points of a depth-3 regression tree on the one feature, at most 7, rising.

    Standard CART (squared error, sides weighted by size). Raises ValueError for fewer than 2 samples.
    """
    from sklearn.tree import DecisionTreeRegressor

    if entropies.size < 2:
        raise ValueError(f"strata: found {entropies.size} samples, allowed: at least 2")
    leaf = max(1, min(min_samples, entropies.size // 16))
    tree = DecisionTreeRegressor(max_depth=CART_DEPTH, min_samples_leaf=leaf)
    tree.fit(entropies.reshape(-1, 1), outcome)
    inner = tree.tree_.children_left >= 0
    return tuple(sorted(float(t) for t in tree.tree_.threshold[inner]))
