# SPDX-License-Identifier: Apache-2.0
"""The drafter's loop over levels with a made-up head, without torch and without vLLM."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from heterospec_vllm.draft.growth import Frontier, grow
from heterospec_vllm.policy.base import Batch, DraftPlan, DraftPolicy, Scope
from heterospec_vllm.policy.cost import ROW_KNOTS, TOKEN_KNOTS, CostTable, StepCosts
from heterospec_vllm.tree.pool import CandidatePool
from heterospec_vllm.tree.trees import DraftTrees

# (request, depth of the children) -> [top_k] probabilities of a node's children, falling
Head = Callable[[int, int], np.ndarray]


@dataclass
class Drafted:
    plan: DraftPlan
    pool: CandidatePool
    trees: DraftTrees
    expanded: list[np.ndarray]  # [num_reqs, num_candidates] of each level


def batch_of(num_reqs: int, limit: int = 63, num_decoding: int | None = None) -> Batch:
    return Batch(
        num_reqs=num_decoding or num_reqs,
        context=100.0 * num_reqs,
        kinds=np.zeros(num_reqs, dtype=np.int64),
        limits=np.full(num_reqs, limit),
    )


class FakeHead:
    """Children by a function instead of a forward pass; notes what the plan chose."""

    def __init__(self, head: Head, top_k: int) -> None:
        self._head, self._top_k = head, top_k
        self.expanded: list[np.ndarray] = []

    def children(self, frontier: Frontier) -> tuple[np.ndarray, np.ndarray]:
        depth = frontier.level + 1
        probs = [self._head(req, depth) for req in frontier.reqs.tolist()]
        with np.errstate(divide="ignore"):
            local = np.log(np.array(probs, dtype=np.float32))
        return np.tile(np.arange(self._top_k), (frontier.num_rows, 1)), local

    def within_reach(self, chosen: np.ndarray, level_pool: CandidatePool) -> np.ndarray:
        self.expanded.append(chosen)
        return chosen


class NoLedger:
    """Nobody looks at the clock."""

    def begin_level(self) -> None:
        pass

    def end_level(self, depth: int, num_rows: int) -> None:
        pass


def draft(
    policy: DraftPolicy, batch: Batch, head: Head, seconds: float = 0.0, scope: Scope = "all"
) -> Drafted:
    """What a drafter does between the first pass and the finished trees."""
    plan = policy.plan(batch, scope)
    children = FakeHead(head, plan.top_k)
    pool = grow(policy, plan, children, NoLedger()).pool
    ranked = pool.ranked(63)
    num_nodes = plan.propose(ranked.survivals, seconds)
    return Drafted(plan, pool, DraftTrees.from_pool(pool, num_nodes, ranked), children.expanded)


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
