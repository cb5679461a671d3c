# SPDX-License-Identifier: Apache-2.0
"""What to draft and what to verify: pure functions of draft-side data, survivals and costs.

Nothing here knows the target's tokens of the step that is being planned, keeps state, or imports vLLM. The classes
that hold what was learned and call these functions are in ``policies.py``.

The price of time (docs/design.md): the batch earns expected tokens per second, ``(R + sum S) / cost``. The ratio is
highest when every node and every draft level is taken whose expected tokens exceed its seconds times that same rate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from heterospec_vllm import level_loops
from heterospec_vllm.tree import Floats, Ints

Bools = NDArray[np.bool_]

PolicyName = Literal["plain", "chain", "static", "paper", "marginal"]
POLICIES: tuple[PolicyName, ...] = ("plain", "chain", "static", "paper", "marginal")

# HeteroSpec, section 3.3: the lowest three strata act.
PAPER_GAMMAS = (0.3, 0.6, 1.0)


@dataclass(frozen=True)
class TreeShape:
    """Bounds of a draft tree.

    ``num_nodes`` draft nodes are verified, drafted over at most ``max_depth`` head passes with ``top_k`` children
    a node and the ``top_k`` best nodes of a level expanded further (EAGLE-2's beam).
    """

    num_nodes: int
    max_depth: int
    top_k: int


def tree_shape(
    policy: PolicyName, num_speculative_tokens: int, max_depth: int, top_k: int
) -> TreeShape:
    """The bounds a policy drafts within: ``chain`` drafts one path of ``min(num_speculative_tokens, max_depth)``."""
    if policy == "chain":
        length = min(num_speculative_tokens, max_depth)
        return TreeShape(num_nodes=length, max_depth=length, top_k=1)
    return TreeShape(num_nodes=num_speculative_tokens, max_depth=max_depth, top_k=top_k)


@dataclass(frozen=True)
class NodeChoice:
    """How many of each request's nodes are verified and what that is expected to earn."""

    num_nodes: Ints  # [num_reqs]
    total: int  # of them
    expected_tokens: float  # of the whole batch, the requests' own next tokens included
    rate: float  # expected tokens per second


def choose_nodes(
    survivals: Floats,  # [num_reqs, max_nodes] falling along each row
    limits: Ints,  # [num_reqs] most nodes of each request
    cost: Floats,  # [max_total + 1] seconds of the cycle with that many nodes in the batch
    other_reqs: int = 0,
) -> NodeChoice:
    """The number of nodes that maximises expected tokens per second, taken over the whole batch's sorted survivals.

    A row is sorted with parents before children, so the chosen ones are a connected prefix of every tree. ``cost``
    also bounds the total (the scheduler's token budget). ``other_reqs`` decode plainly in the same batch.
    """
    num_reqs = survivals.shape[0]
    return NodeChoice(
        *level_loops.best_prefix(
            np.asarray(survivals, dtype=np.float64), limits, cost, float(num_reqs + other_reqs)
        )
    )


def nodes_worth_expanding(
    survivals: Floats,  # [num_reqs, num_candidates] of one level, <= 0 where there is none
    strata: Ints,  # [num_reqs, num_candidates]
    temperatures: Ints,  # [num_reqs]
    continuation: Floats,  # [num_temperatures, num_strata, top_k] expected S(child) / S(node), by the child's rank
    *,
    price: float,  # tokens per second
    node_seconds: float,  # verifying one more node
    row_seconds: float,  # expanding one more node in a level
    level_seconds: float,  # starting a level at all
    beam: int,
) -> Bools:
    """[num_reqs, num_candidates] which nodes a further level expands; none where the level does not pay.

    A node earns what its children are expected to add beyond the price of verifying them. The cost of starting a level
    is shared by all requests that go on.
    """
    return level_loops.worth_expanding(
        np.asarray(survivals, dtype=np.float64),
        strata,
        temperatures,
        continuation,
        price,
        node_seconds,
        row_seconds,
        level_seconds,
        beam,
    )


def in_beam(
    scores: Floats,  # [num_reqs, num_candidates] -inf or NaN where there is none
    beam: int,
) -> Bools:
    """[num_reqs, num_candidates] the ``beam`` best of each row; the first of equals."""
    present = scores > -np.inf  # False for NaN
    if scores.shape[1] <= beam:
        return present
    order = np.argsort(np.where(present, -scores, np.inf), axis=1, kind="stable")[:, :beam]
    chosen = np.zeros(scores.shape, dtype=np.bool_)
    chosen[np.arange(scores.shape[0])[:, None], order] = True
    return chosen & present


def expected_rate(
    curve: Floats,  # [max_nodes] mean survival of the i-th best node of a tree
    num_reqs: int,
    cost: Floats,  # [max_nodes + 1] seconds of a cycle in which every request verifies that many nodes
) -> float:
    """Expected tokens per second of the best equal budget, from what trees looked like lately."""
    tokens = num_reqs * (1.0 + np.concatenate([[0.0], np.cumsum(curve, dtype=np.float64)]))
    return float((tokens / cost[: tokens.size]).max())


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


def hysteresis(on: bool, gain: float, *, start: float, stop: float) -> bool:
    """Whether to speculate: starts above ``start``, stops below ``stop`` (ratios to plain decoding's rate)."""
    return gain >= (stop if on else start)
