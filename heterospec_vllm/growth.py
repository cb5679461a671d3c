# SPDX-License-Identifier: Apache-2.0
"""One level of a draft as arrays: the head's top children become candidates with entropies, strata and survivals."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from heterospec_vllm import level_loops
from heterospec_vllm.policies import Batch, DraftPolicy, Level
from heterospec_vllm.signals import meta_path_end
from heterospec_vllm.tree import NO_ROW, CandidatePool, Floats, Ints


@dataclass(frozen=True)
class Parents:
    """The expanded nodes of a level as their children need them; padded slots have survival 0."""

    columns: Ints  # [num_reqs, width] in the pool, NO_ROW for the root
    log_probs: Floats  # [num_reqs, width]
    survivals: Floats  # [num_reqs, width]
    entropies: Floats  # [num_reqs, width]
    strata: Ints  # [num_reqs, width]

    @classmethod
    def roots(cls, num_reqs: int) -> Parents:
        """The roots of a batch, as parents of the first level."""
        zeros = np.zeros((num_reqs, 1), dtype=np.float32)
        none = np.full((num_reqs, 1), NO_ROW)
        return cls(
            none, zeros, np.ones((num_reqs, 1)), zeros, np.zeros((num_reqs, 1), dtype=np.int64)
        )


def children_of(
    policy: DraftPolicy,
    batch: Batch,
    depth: int,
    parent: Parents,
    rows: Ints,  # [num_reqs, width] head rows of the parents, NO_ROW padded
    tokens: Ints,  # [num_rows, top_k]
    local: Floats,  # [num_rows, top_k]
) -> CandidatePool:
    """One level of the pool; the children of padded parents are absent."""
    tokens, log_probs, entropies, strata, parents, ranks, survivals = level_loops.children(
        parent.columns,
        parent.log_probs,
        parent.entropies,
        parent.survivals,
        rows,
        tokens,
        local,
        policy.strata.cuts(depth),
    )
    return CandidatePool(
        tokens=tokens,
        log_probs=log_probs,
        survivals=policy.survivals(batch, depth, log_probs, strata, survivals),
        strata=strata,
        entropies=entropies,
        parents=parents,
        ranks=ranks,
    )


def level_of(
    policy: DraftPolicy,
    depth: int,
    level_pool: CandidatePool,
    parent: Parents,
    meta_entropies: Floats,  # [num_reqs], brought up to date for requests that reached this level
) -> Level:
    if policy.follows_meta_path:
        top_k = level_pool.tokens.shape[1] // parent.columns.shape[1]
        parent_log_probs = np.repeat(parent.log_probs, top_k, axis=1)
        update_meta_entropies(policy, depth, level_pool, parent_log_probs, meta_entropies)
    return Level(
        depth=depth,
        log_probs=level_pool.log_probs,
        entropies=level_pool.entropies,
        survivals=level_pool.survivals,
        strata=level_pool.strata,
        meta_entropies=meta_entropies,
    )


def update_meta_entropies(
    policy: DraftPolicy,
    depth: int,
    level_pool: CandidatePool,
    parent_log_probs: Floats,  # [num_reqs, num_candidates] of each candidate's parent, 0 for the root
    meta_entropies: Floats,  # [num_reqs], brought up to date for requests that reached this level
) -> None:
    """Entropy along the meta-path as it ends in this level."""
    with np.errstate(invalid="ignore"):  # an absent child of an absent parent
        local = level_pool.log_probs - parent_log_probs
    depths = np.full(level_pool.tokens.shape[1], depth)
    end = meta_path_end(depths, level_pool.log_probs, local, policy.reading)[:, None]
    reached = np.take_along_axis(level_pool.survivals, end, axis=1)[:, 0] > 0
    entropy = np.take_along_axis(level_pool.entropies, end, axis=1)[:, 0]
    meta_entropies[reached] = entropy[reached]
