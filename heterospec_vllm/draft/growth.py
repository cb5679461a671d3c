# SPDX-License-Identifier: Apache-2.0
"""How a draft grows, level by level: the one loop, for the engine, for replays of traces and for tests.

A head gives the children of the nodes that a plan finds worth expanding. They become candidates with entropies, strata
and survivals, and the best of them are expanded next. Neither torch nor vLLM is needed here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from heterospec_vllm.arrays import NO_ROW, Bools, Floats, Ints, Ints32
from heterospec_vllm.compiled import compiled
from heterospec_vllm.draft.signals import meta_path_end, row_entropy
from heterospec_vllm.policy.base import DraftPlan, DraftPolicy, Level
from heterospec_vllm.policy.survival import CONSTRAINED
from heterospec_vllm.timing import CLOCK
from heterospec_vllm.tree.pool import CandidatePool


@compiled(
    "Tuple((i8[:,::1], f4[:,::1], f4[:,::1], i8[:,::1], i8[:,::1], i8[:,::1], f8[:,::1]))"
    "(i8[:,:], f4[:,:], f4[:,:], f8[:,:], i8[:,:], i8[:,:], f4[:,:], f8[:])"
)
def children(
    columns,  # [num_reqs, width] of the parents, NO_ROW for the root
    log_probs,  # [num_reqs, width] of the parents
    entropies,  # [num_reqs, width]
    survivals,  # [num_reqs, width]
    rows,  # [num_reqs, width] the parents' rows in the head's batch, NO_ROW padded
    tokens,  # [num_rows, top_k]
    local,  # [num_rows, top_k] log-probabilities
    edges,  # [num_strata - 1] rising
):
    """[num_reqs, width * top_k] each: tokens, log_probs, entropies, strata, parents, ranks, parents' survivals."""
    num_reqs, width = rows.shape
    top_k = tokens.shape[1]
    size = width * top_k
    out_tokens = np.zeros((num_reqs, size), np.int64)
    out_log_probs = np.full((num_reqs, size), -np.inf, np.float32)
    out_entropies = np.zeros((num_reqs, size), np.float32)
    out_strata = np.zeros((num_reqs, size), np.int64)
    out_parents = np.empty((num_reqs, size), np.int64)
    out_ranks = np.empty((num_reqs, size), np.int64)
    out_survivals = np.empty((num_reqs, size), np.float64)
    for req in range(num_reqs):
        for place in range(width):
            row = rows[req, place]
            entropy = np.float32(0.0)
            stratum = 0
            if row >= 0:
                entropy = np.float32(entropies[req, place] + row_entropy(local[row]))
                stratum = int(np.searchsorted(edges, entropy))
            for rank in range(top_k):
                at = place * top_k + rank
                if row >= 0:
                    out_tokens[req, at] = tokens[row, rank]
                    out_log_probs[req, at] = log_probs[req, place] + local[row, rank]
                out_entropies[req, at] = entropy
                out_strata[req, at] = stratum
                out_parents[req, at] = columns[req, place]
                out_ranks[req, at] = rank
                out_survivals[req, at] = survivals[req, place]
    return (
        out_tokens,
        out_log_probs,
        out_entropies,
        out_strata,
        out_parents,
        out_ranks,
        out_survivals,
    )


@compiled(
    "Tuple((i8[:,::1], f4[:,::1], f8[:,::1], f4[:,::1], i8[:,::1], i8[:,::1], i8[::1], i8[::1], i8[::1],"
    " i4[::1], i4[:,::1]))"
    "(b1[:,:], i8[:,:], i8[:,:], f4[:,:], f8[:,:], f4[:,:], i8[:,:], i8, i4[:,:], i8)"
)
def pack_frontier(
    chosen,  # [num_reqs, num_candidates]
    rows,  # [num_reqs, width] the head's rows of the level's parents
    tokens,  # [num_reqs, num_candidates], likewise the next four
    log_probs,
    survivals,
    entropies,
    strata,
    first_column,  # of the level in the pool
    tail,  # [num_parent_rows, level - 1] rows of each parent's ancestors and of itself
    first_row,  # of the new rows among those of all levels
):
    """The chosen candidates packed to the left.

    [num_reqs, new_width] the fields of ``Parents`` (survivals 0 where padded) and the new rows (NO_ROW where padded);
    [num_new_rows] request, parent's row and token of each; [num_reqs + 1] where each request's rows start;
    [num_new_rows, level] the parent's tail and the own row.
    """
    num_reqs, num_candidates = chosen.shape
    top_k = num_candidates // rows.shape[1]
    above = tail.shape[1]
    start = np.zeros(num_reqs + 1, np.int32)
    width = 0
    for req in range(num_reqs):
        count = 0
        for at in range(num_candidates):
            count += chosen[req, at]
        start[req + 1] = start[req] + count
        width = max(width, count)
    num_rows = start[num_reqs]
    columns = np.full((num_reqs, width), first_column, np.int64)
    out_log_probs = np.zeros((num_reqs, width), np.float32)
    out_survivals = np.zeros((num_reqs, width), np.float64)
    out_entropies = np.zeros((num_reqs, width), np.float32)
    out_strata = np.zeros((num_reqs, width), np.int64)
    own = np.full((num_reqs, width), NO_ROW, np.int64)
    reqs = np.empty(num_rows, np.int64)
    parents = np.empty(num_rows, np.int64)
    node_tokens = np.empty(num_rows, np.int64)
    new_tail = np.empty((num_rows, above + 1), np.int32)
    for req in range(num_reqs):
        place = 0
        for at in range(num_candidates):
            if chosen[req, at]:
                row = start[req] + place
                parent = rows[req, at // top_k]
                columns[req, place] = first_column + at
                out_log_probs[req, place] = log_probs[req, at]
                out_survivals[req, place] = survivals[req, at]
                out_entropies[req, place] = entropies[req, at]
                out_strata[req, place] = strata[req, at]
                own[req, place] = row
                reqs[row] = req
                parents[row] = parent
                node_tokens[row] = tokens[req, at]
                for i in range(above):
                    new_tail[row, i] = tail[parent, i]
                new_tail[row, above] = first_row + row
                place += 1
    return (
        columns,
        out_log_probs,
        out_survivals,
        out_entropies,
        out_strata,
        own,
        reqs,
        parents,
        node_tokens,
        start,
        new_tail,
    )


@compiled("i8[::1](i8[:], i8[:], i8, i8)")
def level_positions(
    positions,  # [num_reqs] of the last accepted token
    reqs,  # [num_rows]
    level,
    last,
):
    """[num_rows] positions of nodes ``level`` behind the accepted tokens, at most ``last``."""
    out = np.empty(reqs.size, np.int64)
    for row in range(reqs.size):
        out[row] = min(positions[reqs[row]] + level, last)
    return out


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


@dataclass(frozen=True)
class Frontier:
    """The nodes of a level that are expanded next, and the head's rows that stand for them, request by request."""

    level: int  # 0 for the roots
    parents: Parents  # [num_reqs, width] the nodes as their children need them
    rows: Ints  # [num_reqs, width] their row in the head's batch, NO_ROW padded
    reqs: Ints  # [num_rows] request of each row
    parent_rows: Ints  # [num_rows] row of each one's parent in the batch before
    tokens: Ints  # [num_rows]
    query_start_loc: Ints32  # [num_reqs + 1]
    # [num_rows, level] rows, over all levels but the roots, of their ancestors and of themselves
    tail: Ints32
    first_row: int  # rows of the levels before, the roots not counted

    @property
    def num_rows(self) -> int:
        return self.tokens.size

    @classmethod
    def roots(cls, num_reqs: int) -> Frontier:
        """The roots of a batch: the first pass has been over them."""
        reqs = np.arange(num_reqs)
        return cls(
            level=0,
            parents=Parents.roots(num_reqs),
            rows=reqs[:, None],
            reqs=reqs,
            parent_rows=reqs,
            tokens=reqs,  # their children only are drafted
            query_start_loc=np.arange(num_reqs + 1, dtype=np.int32),
            tail=np.empty((num_reqs, 0), dtype=np.int32),
            first_row=0,
        )

    def below(
        self,
        chosen: Bools,  # [num_reqs, num_candidates]
        level_pool: CandidatePool,  # the children of these nodes
        first_column: int,  # of the level in the pool
    ) -> Frontier:
        """The chosen children, packed to the left."""
        first_row = self.first_row + self.num_rows if self.level else 0
        *of_parents, rows, reqs, parent_rows, tokens, start, tail = pack_frontier(
            chosen,
            self.rows,
            level_pool.tokens,
            level_pool.log_probs,
            level_pool.survivals,
            level_pool.entropies,
            level_pool.strata,
            first_column,
            self.tail,
            first_row,
        )
        return Frontier(
            level=self.level + 1,
            parents=Parents(*of_parents),
            rows=rows,
            reqs=reqs,
            parent_rows=parent_rows,
            tokens=tokens,
            query_start_loc=start,
            tail=tail,
            first_row=first_row,
        )


class DraftHead(Protocol):
    """What a draft grows with: the children of given rows."""

    def children(self, frontier: Frontier) -> tuple[Ints, Floats]:
        """[num_rows, top_k] each: the likeliest next tokens of each row and their log-probabilities, falling."""

    def within_reach(
        self,
        chosen: Bools,  # [num_reqs, num_candidates]
        level_pool: CandidatePool,
    ) -> Bools:
        """[num_reqs, num_candidates] those of the chosen nodes that the head can expand."""


class DraftLedger(Protocol):
    """What keeps the time of a draft's levels and tells the policy."""

    def begin_level(self) -> None:
        """The level before is done; what follows belongs to the next one."""

    def end_level(self, depth: int, num_rows: int) -> None:
        """The children of ``num_rows`` nodes were proposed; depth 1 belongs to the first pass."""


@dataclass(frozen=True)
class Growth:
    """What a draft proposed and how far it went."""

    pool: CandidatePool
    rows: list[int]  # nodes expanded in each level beyond the first


def grow(policy: DraftPolicy, plan: DraftPlan, head: DraftHead, ledger: DraftLedger) -> Growth:
    """Grow the candidates of a batch level by level, from the nodes that the plan finds worth it.

    ``policy`` is taught how much of a node's survival its children inherit.
    """
    frontier = Frontier.roots(plan.batch.limits.size)
    meta_entropies = np.zeros(plan.batch.limits.size, dtype=np.float32)
    levels: list[CandidatePool] = []
    rows: list[int] = []
    num_columns = 0
    for depth in range(1, plan.max_depth + 1):
        tokens, local = head.children(frontier)
        with CLOCK.span("policy"):
            level_pool = children_of(plan, depth, frontier, tokens, local)
        levels.append(level_pool)
        ledger.end_level(depth, frontier.num_rows)
        if depth > 1:
            parents = frontier.parents
            survivals = level_pool.survivals.reshape(*frontier.rows.shape, tokens.shape[1])
            policy.observe_children(
                plan.batch, depth - 1, parents.strata, parents.survivals, survivals
            )
        if depth == plan.max_depth:
            break
        ledger.begin_level()
        with CLOCK.span("policy"):
            level = level_of(plan, depth, level_pool, frontier.parents, meta_entropies)
            chosen = plan.expand(level)
        frontier = frontier.below(head.within_reach(chosen, level_pool), level_pool, num_columns)
        if not frontier.num_rows:
            break
        rows.append(frontier.num_rows)
        num_columns += level_pool.tokens.shape[1]
    return Growth(CandidatePool.concatenate(levels), rows)


def children_of(
    plan: DraftPlan,
    depth: int,
    frontier: Frontier,  # the parents
    tokens: Ints,  # [num_rows, top_k]
    local: Floats,  # [num_rows, top_k]
) -> CandidatePool:
    """One level of the pool; the children of padded parents are absent."""
    parent = frontier.parents
    tokens, log_probs, entropies, strata, parents, ranks, survivals = children(
        parent.columns,
        parent.log_probs,
        parent.entropies,
        parent.survivals,
        frontier.rows,
        tokens,
        local,
        plan.strata.cuts(depth),
    )
    own = plan.survivals(depth, log_probs, strata, survivals)
    constrained = plan.batch.kinds >= CONSTRAINED
    if constrained.any():
        # A grammar that allows a single token decides as the target will.
        above = np.repeat(parent.log_probs, ranks.shape[1] // parent.columns.shape[1], axis=1)
        certain = constrained[:, None] & (ranks == 0) & (log_probs == above)
        own = np.where(certain, survivals, own)
    return CandidatePool(
        tokens=tokens,
        log_probs=log_probs,
        survivals=own,
        strata=strata,
        entropies=entropies,
        parents=parents,
        ranks=ranks,
    )


def level_of(
    plan: DraftPlan,
    depth: int,
    level_pool: CandidatePool,
    parent: Parents,
    meta_entropies: Floats,  # [num_reqs], brought up to date for requests that reached this level
) -> Level:
    if plan.follows_meta_path:
        top_k = level_pool.tokens.shape[1] // parent.columns.shape[1]
        parent_log_probs = np.repeat(parent.log_probs, top_k, axis=1)
        update_meta_entropies(plan, depth, level_pool, parent_log_probs, meta_entropies)
    return Level(
        depth=depth,
        log_probs=level_pool.log_probs,
        entropies=level_pool.entropies,
        survivals=level_pool.survivals,
        strata=level_pool.strata,
        meta_entropies=meta_entropies,
    )


def update_meta_entropies(
    plan: DraftPlan,
    depth: int,
    level_pool: CandidatePool,
    parent_log_probs: Floats,  # [num_reqs, num_candidates] of each candidate's parent, 0 for the root
    meta_entropies: Floats,  # [num_reqs], brought up to date for requests that reached this level
) -> None:
    """Entropy along the meta-path as it ends in this level."""
    with np.errstate(invalid="ignore"):  # an absent child of an absent parent
        local = level_pool.log_probs - parent_log_probs
    depths = np.full(level_pool.tokens.shape[1], depth)
    end = meta_path_end(depths, level_pool.log_probs, local, plan.reading)[:, None]
    reached = np.take_along_axis(level_pool.survivals, end, axis=1)[:, 0] > 0
    entropy = np.take_along_axis(level_pool.entropies, end, axis=1)[:, 0]
    meta_entropies[reached] = entropy[reached]
