# SPDX-License-Identifier: Apache-2.0
"""Survival: the probability that a draft node lies on the path that the target accepts.

S(v | path probability, depth, stratum, kind) is read from tables and learned from every verified node: whether
the walk reached it. Cells that have seen little lean on coarser ones (all strata of a depth, then all depths), those on
the profile, and without a profile on the path probability, lowered. Nothing here looks at tokens or at target logits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from heterospec_vllm.arrays import Floats, Ints
from heterospec_vllm.compiled import compiled
from heterospec_vllm.policy.isotonic import isotonic
from heterospec_vllm.policy.strata import NUM_STRATA


@compiled("Tuple((i8, f8))(f8[:], f8)")
def _knot_below(knots, log_prob):
    """The knot below a log path probability and how far it is on the way to the next; NaN counts as the lowest."""
    last = knots.size - 1
    x = knots[0] if math.isnan(log_prob) else min(max(log_prob, knots[0]), knots[last])
    low = min(np.searchsorted(knots, x, side="right") - 1, last - 1)
    return low, (x - knots[low]) / (knots[low + 1] - knots[low])


@compiled("f8(f8[:,:,:,:], f8[:], f8, i8, i8, i8)")
def _survival(table, knots, log_prob, depth, stratum, kind):
    """Linear between the knots around a log path probability."""
    low, share = _knot_below(knots, log_prob)
    cell = table[kind, min(depth, table.shape[1]) - 1, stratum]
    return cell[low] + share * (cell[low + 1] - cell[low])


@compiled("f8[:,::1](f8[:,:,:,:], f8[:], f4[:,:], i8, i8[:,:], i8[:], f8[:,:])")
def level_survivals(
    table,  # [num_kinds, max_depth, num_strata, num_knots]
    knots,  # [num_knots]
    log_probs,  # [num_reqs, num_candidates]
    depth,
    strata,  # [num_reqs, num_candidates]
    kinds,  # [num_reqs]
    parents,  # [num_reqs, num_candidates] their parents' survivals
):
    """[num_reqs, num_candidates] never above the parent's; 0 where absent (-inf, NaN)."""
    out = np.zeros(log_probs.shape, np.float64)
    for req in range(log_probs.shape[0]):
        for at in range(log_probs.shape[1]):
            value = log_probs[req, at]
            if value > -np.inf:
                own = _survival(table, knots, value, depth, strata[req, at], kinds[req])
                out[req, at] = min(own, parents[req, at])
    return out


@compiled("f8[::1](f8[:,:,:,:], f8[:], f8[:], i8[:], i8[:], i8[:])")
def node_survivals(table, knots, log_probs, depths, strata, kinds):
    """[num_nodes] each on its own."""
    out = np.empty(log_probs.size, np.float64)
    for i in range(log_probs.size):
        out[i] = _survival(table, knots, log_probs[i], depths[i], strata[i], kinds[i])
    return out


@compiled("void(f8[:,:,:,:], f8[:,:,:,:], f8[:], f8[:], i8[:], i8[:], i8[:], f8[:])")
def count_outcomes(
    hits,  # [num_kinds, max_depth, num_strata, num_knots] added to, like trials
    trials,
    knots,
    log_probs,  # [num_nodes], likewise the others
    depths,
    strata,
    kinds,
    accepted,
):
    """Shares every outcome among the two knots around it."""
    for i in range(accepted.size):
        low, share = _knot_below(knots, log_probs[i])
        depth = min(depths[i], hits.shape[1]) - 1
        for knot, part in ((low, 1.0 - share), (low + 1, share)):
            trials[kinds[i], depth, strata[i], knot] += part
            hits[kinds[i], depth, strata[i], knot] += part * accepted[i]


# Knots over the log path probability; between two of them S is interpolated.
KNOTS = -np.array([9.0, 7.0, 5.5, 4.3, 3.4, 2.7, 2.1, 1.6, 1.2, 0.85, 0.55, 0.3, 0.12, 0.03, 0.0])
TABLE_DEPTH = 8  # depths with a table of their own; deeper nodes share the last one
# A request's kind: 0 greedy, 1 sampled; RULED more where penalties and the like change its logits, CONSTRAINED more
# where a grammar does. A head that knows nothing of them is as often right as before, or less, and learns which.
RULED, CONSTRAINED = 2, 4
NUM_KINDS = 6
NUM_PROFILE_KINDS = 2  # those of ordinary requests are measured; the others begin like them
PROFILE_SHAPE = (NUM_PROFILE_KINDS, TABLE_DEPTH, NUM_STRATA, KNOTS.size)
SHAPE = (NUM_KINDS, *PROFILE_SHAPE[1:])


@dataclass(frozen=True)
class NodeFeatures:
    """What survival may depend on, for any number of nodes; all arrays have one shape."""

    log_probs: Floats  # cumulative from the root
    depths: Ints  # >= 1
    strata: Ints
    kinds: Ints  # of the request: below NUM_KINDS

    def __getitem__(self, index: Any) -> NodeFeatures:
        return NodeFeatures(
            self.log_probs[index], self.depths[index], self.strata[index], self.kinds[index]
        )


@dataclass
class SurvivalTables:
    """Counts behind the estimate and the estimate itself.

    ``prior_weight``: how many observations a coarser level is worth to a finer one. ``memory``: observations a cell
    remembers; beyond it the oldest fade.
    """

    prior: Floats = field(default_factory=lambda: default_prior())
    prior_weight: float = 12.0
    profile_weight: float = 60.0
    memory: float = 3000.0
    refresh_every: int = 96  # observations between two refreshes of the estimate

    def __post_init__(self) -> None:
        self.prior = np.tile(self.prior, (SHAPE[0] // self.prior.shape[0], 1, 1, 1))
        assert self.prior.shape == SHAPE
        self._hits = np.zeros(SHAPE)
        self._trials = np.zeros(SHAPE)
        self._pending = 0
        self.estimate = self.prior.copy()

    def predict(self, nodes: NodeFeatures) -> Floats:
        """Survival of each node on its own; use :func:`along_paths` to keep paths non-increasing."""
        flat = node_survivals(self.estimate, KNOTS, *_flat(nodes))
        return flat.reshape(nodes.log_probs.shape)

    def of_ordinary_requests(self) -> Floats:
        """[num_profile_kinds, max_depth, num_strata, num_knots] what a profile keeps of the estimate."""
        return self.estimate[:NUM_PROFILE_KINDS]

    def of_level(
        self,
        log_probs: Floats,  # [num_reqs, num_candidates] float32, -inf or NaN where absent
        depth: int,
        strata: Ints,  # [num_reqs, num_candidates]
        kinds: Ints,  # [num_reqs]
        parent_survivals: Floats,  # [num_reqs, num_candidates] float64
    ) -> Floats:
        """[num_reqs, num_candidates] of a draft level, never above the parent's, 0 where absent."""
        return level_survivals(
            self.estimate, KNOTS, log_probs, depth, strata, kinds, parent_survivals
        )

    def observe(self, nodes: NodeFeatures, accepted: Floats) -> None:
        """Verified nodes (flat arrays) and whether each was accepted (0 or 1)."""
        if not accepted.size:
            return
        count_outcomes(
            self._hits, self._trials, KNOTS, *_flat(nodes), accepted.astype(np.float64, copy=False)
        )
        self._pending += accepted.size
        if self._pending >= self.refresh_every:
            self.refresh()

    def refresh(self) -> None:
        """Bring the estimate up to date with the counts."""
        self._pending = 0
        fade = np.minimum(1.0, self.memory / np.maximum(self._trials, 1.0))
        self._trials *= fade
        self._hits *= fade
        self.estimate = self._shrunk()

    def _shrunk(self) -> Floats:
        hits, trials = self._hits, self._trials
        # How far off the prior is at each path probability, over all strata and depths, moves cells that have seen
        # nothing; then depths, then strata speak for themselves.
        expected = trials * self.prior
        level = self.prior
        for axes, weight in (((1, 2), self.profile_weight), ((2,), self.prior_weight * 2)):
            seen = trials.sum(axis=axes, keepdims=True)
            hit = hits.sum(axis=axes, keepdims=True)
            want = expected.sum(axis=axes, keepdims=True)
            # Odds are kept within bounds by shifting the logit, not by scaling the probability.
            rate = (hit + weight * 0.5) / (seen + weight)
            base = (want + weight * 0.5) / (seen + weight)
            level = _sigmoid(_logit(level) + _logit(rate) - _logit(base))
            expected = trials * level
        cells = (hits + self.prior_weight * level) / (trials + self.prior_weight)
        return monotone(cells, trials + self.prior_weight)

    def log_loss(self, nodes: NodeFeatures, accepted: Floats) -> float:
        """Mean negative log-likelihood of outcomes, in nats."""
        return log_loss(self.predict(nodes), accepted)


def default_prior() -> Floats:
    """Without a profile: the path probability, lowered by a tenth a level, as heads tend to be overconfident."""
    depth = np.arange(1, TABLE_DEPTH + 1)[None, :, None, None]
    table = np.exp(KNOTS)[None, None, None, :] * 0.9**depth
    return np.broadcast_to(np.clip(table, 1e-4, 0.97), SHAPE).copy()


def monotone(
    table: Floats,  # [..., num_knots]
    weights: Floats,  # the same shape, > 0: observations behind each value
) -> Floats:
    """Rising along the path probability (last axis), the nearest to the table in weighted squares.

    Values that fall are pooled by weight: a cell that was never seen gives way to one that was seen often.
    """
    rows = table.reshape(-1, table.shape[-1]).copy()
    falling = (np.diff(rows, axis=1) < 0).any(axis=1)
    if falling.any():
        rows[falling] = isotonic(rows[falling], weights.reshape(rows.shape)[falling])
    return np.clip(rows.reshape(table.shape), 1e-4, 0.995)


def along_paths(
    survivals: Floats,  # [num_reqs, num_nodes] of the children
    parent_survivals: Floats,  # [num_reqs, num_nodes] of their parents, 1 for the root
) -> Floats:
    """[num_reqs, num_nodes] no child survives more often than its parent."""
    return np.minimum(survivals, parent_survivals)


def log_loss(probability: Floats, accepted: Floats) -> float:
    p = np.clip(probability.astype(np.float64), 1e-6, 1 - 1e-6)
    return float(-(accepted * np.log(p) + (1 - accepted) * np.log1p(-p)).mean())


def _flat(nodes: NodeFeatures) -> tuple[Floats, Ints, Ints, Ints]:
    """The fields as the compiled loops take them."""
    return (
        np.ravel(nodes.log_probs).astype(np.float64, copy=False),
        np.ravel(nodes.depths).astype(np.int64, copy=False),
        np.ravel(nodes.strata).astype(np.int64, copy=False),
        np.ravel(nodes.kinds).astype(np.int64, copy=False),
    )


def _logit(p: Floats) -> Floats:
    p = np.clip(p, 1e-4, 1 - 1e-4)
    return np.log(p) - np.log1p(-p)


def _sigmoid(x: Floats) -> Floats:
    return 1.0 / (1.0 + np.exp(-x))
