# SPDX-License-Identifier: Apache-2.0
"""Everything that a draft proposed for a batch, before nodes are chosen, and the loops over it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from heterospec_vllm.arrays import Floats, Ints
from heterospec_vllm.compiled import compiled


@dataclass(frozen=True)
class Ranked:
    """The best candidates of each request's pool, best first; absent ones at the end."""

    columns: Ints  # [num_reqs, width]
    survivals: Floats  # [num_reqs, width] float64, 0 where absent
    num_present: int  # candidates of the whole pool, ranked here or not


@dataclass(frozen=True)
class CandidatePool:
    """Everything the draft head proposed for a batch in one step, before nodes are chosen.

    Columns are in expansion order: a parent's column is lower than its children's. A request that was not expanded as
    far as others has absent candidates: log-probability -inf, survival 0.
    """

    tokens: Ints  # [num_reqs, pool_size]
    log_probs: Floats  # [num_reqs, pool_size] cumulative from the root, non-increasing along a path
    survivals: Floats  # [num_reqs, pool_size] what nodes are ranked by, non-increasing along a path
    strata: Ints  # [num_reqs, pool_size] of the entropy summed along the node's path
    entropies: Floats  # [num_reqs, pool_size] that entropy, in nats
    parents: Ints  # [num_reqs, pool_size] column of the parent, NO_ROW = child of the root
    ranks: (
        Ints  # [num_reqs, pool_size] place among its siblings by draft probability, 0 = most likely
    )

    def ranked(self, width: int) -> Ranked:
        """The best candidates; parents come before their children.

        The sort is stable and a child never survives its parent, so every prefix is connected.
        """
        survivals = np.asarray(self.survivals, dtype=np.float64)
        return Ranked(*ranked(survivals, min(width, survivals.shape[1])))

    @classmethod
    def concatenate(cls, levels: list[CandidatePool]) -> CandidatePool:
        """The levels of one draft side by side."""
        joined, *others = levels
        for level in others:
            joined = cls(*side_by_side(*joined._fields, *level._fields))
        return joined

    @property
    def _fields(self) -> tuple:
        return (
            self.tokens, self.log_probs, self.survivals, self.strata, self.entropies,
            self.parents, self.ranks,
        )  # fmt: skip


_POOL = "i8[:,{0}], f4[:,{0}], f8[:,{0}], i8[:,{0}], f4[:,{0}], i8[:,{0}], i8[:,{0}]"
_ANY_POOL = _POOL.format(":")


@compiled(f"Tuple(({_POOL.format('::1')}))({_ANY_POOL}, {_ANY_POOL})")
def side_by_side(
    tokens,  # the fields of CandidatePool
    log_probs,
    survivals,
    strata,
    entropies,
    parents,
    ranks,
    more_tokens,  # those of another one over the same requests
    more_log_probs,
    more_survivals,
    more_strata,
    more_entropies,
    more_parents,
    more_ranks,
):
    """The columns of both."""
    return (
        np.concatenate((tokens, more_tokens), axis=1),
        np.concatenate((log_probs, more_log_probs), axis=1),
        np.concatenate((survivals, more_survivals), axis=1),
        np.concatenate((strata, more_strata), axis=1),
        np.concatenate((entropies, more_entropies), axis=1),
        np.concatenate((parents, more_parents), axis=1),
        np.concatenate((ranks, more_ranks), axis=1),
    )


@compiled("Tuple((i8[:,::1], f8[:,::1], i8))(f8[:,:], i8)")
def ranked(
    survivals,  # [num_reqs, pool_size]; NaN (a poisoned head) sorts last, never first
    width,  # at most pool_size
):
    """[num_reqs, width] each: the best columns, of equals the first ones first, and their survivals; all present."""
    num_reqs, pool_size = survivals.shape
    columns = np.empty((num_reqs, width), np.int64)
    best = np.empty((num_reqs, width), np.float64)
    key = np.empty(pool_size, np.float64)
    present = 0
    for req in range(num_reqs):
        for at in range(pool_size):
            key[at] = 0.0
            if survivals[req, at] > 0.0:
                key[at] = -survivals[req, at]
                present += 1
        order = np.argsort(key, kind="mergesort")
        for place in range(width):
            columns[req, place] = order[place]
            best[req, place] = -key[order[place]]
    return columns, best, present
