# SPDX-License-Identifier: Apache-2.0
"""The drafter's loop over levels with a made-up head, without torch and without vLLM."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from heterospec_vllm.draft.growth import Parents, children_of, frontier, level_of
from heterospec_vllm.policy.base import Batch, DraftPolicy
from heterospec_vllm.policy.cost import ROW_KNOTS, TOKEN_KNOTS, CostTable, StepCosts
from heterospec_vllm.tree.pool import CandidatePool
from heterospec_vllm.tree.trees import DraftTrees

# (request, depth of the children) -> [top_k] probabilities of a node's children, falling
Head = Callable[[int, int], np.ndarray]


@dataclass
class Drafted:
    pool: CandidatePool
    trees: DraftTrees
    expanded: list[np.ndarray]  # [num_reqs, num_candidates] of each level


def batch_of(num_reqs: int, limit: int = 63, num_decoding: int | None = None) -> Batch:
    return Batch(
        num_reqs=num_decoding or num_reqs,
        context=100.0 * num_reqs,
        temperatures=np.zeros(num_reqs, dtype=np.int64),
        limits=np.full(num_reqs, limit),
    )


def draft(policy: DraftPolicy, batch: Batch, head: Head, seconds: float = 0.0) -> Drafted:
    """What `HeteroSpecProposer` does between the first pass and the finished trees."""
    num_reqs, top_k = batch.limits.size, policy.shape.top_k
    parent = Parents.roots(num_reqs)
    rows = np.arange(num_reqs)[:, None]
    pools: list[CandidatePool] = []
    expanded = []
    meta = np.zeros(num_reqs, dtype=np.float32)
    depth, size = 0, 0
    while True:
        depth += 1
        reqs = np.nonzero(rows >= 0)[0]
        with np.errstate(divide="ignore"):
            local = np.log(np.array([head(req, depth) for req in reqs], dtype=np.float32))
        tokens = np.tile(np.arange(top_k), (len(reqs), 1))
        pool = children_of(policy, batch, depth, parent, rows, tokens, local)
        pools.append(pool)
        if depth > 1:
            children = pool.survivals.reshape(*rows.shape, top_k)
            policy.observe_children(batch, depth - 1, parent.strata, parent.survivals, children)
        if depth >= policy.max_depth:
            break
        chosen = policy.expand(batch, level_of(policy, depth, pool, parent, meta))
        expanded.append(chosen)
        if not chosen.any():
            break
        parent, rows = packed(chosen, rows, pool, size)
        size += pool.tokens.shape[1]
    pool = CandidatePool.concatenate(pools)
    ranked = pool.ranked(63)
    num_nodes = policy.propose(batch, ranked.survivals, seconds)
    return Drafted(pool, DraftTrees.from_pool(pool, num_nodes, ranked), expanded)


def packed(
    chosen: np.ndarray, rows: np.ndarray, pool: CandidatePool, first_column: int
) -> tuple[Parents, np.ndarray]:
    """The chosen candidates of a level as parents of the next one, and their rows in the head's batch."""
    no_tail = np.zeros((rows.max() + 1, 0), dtype=np.int32)
    columns = pool.tokens, pool.log_probs, pool.survivals, pool.entropies, pool.strata
    *of_parents, own, _, _, _, _, _ = frontier(chosen, rows, *columns, first_column, no_tail, 0)
    return Parents(*of_parents), own


def depths_of(drafted: Drafted) -> list[int]:
    """How many levels each request was drafted, whether verified or not."""
    levels = np.cumsum([0, *(len(chosen[0]) for chosen in drafted.expanded)])
    last = drafted.pool.tokens.shape[1]
    bounds = [*levels.tolist(), last] if levels[-1] < last else levels.tolist()
    present = drafted.pool.log_probs > -np.inf
    reached = [
        present[:, start:stop].any(axis=1) for start, stop in zip(bounds, bounds[1:], strict=False)
    ]
    return np.sum(reached, axis=0).tolist()


def step_costs(
    node: float = 0.0005, start: float = 0.02, level: float = 0.001, row: float = 0.0001
) -> StepCosts:
    """Seconds that grow evenly from a start: with tokens of the target, with rows of a draft level."""
    return StepCosts(
        verify=CostTable(TOKEN_KNOTS, start + node * np.array(TOKEN_KNOTS), trust=4.0),
        first_pass=CostTable(TOKEN_KNOTS, 0.001 + 0.00001 * np.array(TOKEN_KNOTS)),
        level=CostTable(ROW_KNOTS, level + row * np.array(ROW_KNOTS)),
    )
