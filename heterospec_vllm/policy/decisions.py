# SPDX-License-Identifier: Apache-2.0
"""What to draft and what to verify: pure functions of draft-side data, survivals and costs.

Nothing here knows the target's tokens of the step that is being planned, keeps state, or imports vLLM. The classes
that hold what was learned and call these functions are the policies (``policy/base.py``, ``policy/marginal.py``,
``policy/paper.py``).

The price of time (docs/design.md): the batch earns expected tokens per second, ``(R + sum S) / cost``. The ratio is
highest when every node and every draft level is taken whose expected tokens exceed its seconds times that same rate.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from heterospec_vllm.arrays import Bools, Floats, Ints
from heterospec_vllm.compiled import compiled
from heterospec_vllm.config import PolicyName


@compiled("b1[:,::1](f8[:,:], i8[:,:], i8[:], f8[:,:,:], f8, f8, f8, f8, i8)")
def worth_expanding(
    survivals,  # [num_reqs, num_candidates] <= 0 where there is none
    strata,  # [num_reqs, num_candidates]
    kinds,  # [num_reqs]
    continuation,  # [num_kinds, num_strata, top_k]
    price,
    node_seconds,
    row_seconds,
    level_seconds,
    beam,
):
    """[num_reqs, num_candidates] ``policy.nodes_worth_expanding``."""
    num_reqs, num_candidates = survivals.shape
    chosen = np.zeros((num_reqs, num_candidates), np.bool_)
    gains = np.empty(num_candidates, np.float64)
    total = 0.0
    for req in range(num_reqs):
        for at in range(num_candidates):
            gain = -1.0
            if survivals[req, at] > 0.0:
                gain = -price * row_seconds
                shares = continuation[kinds[req], strata[req, at]]
                for rank in range(shares.size):
                    spare = survivals[req, at] * shares[rank]
                    gain += max(spare - price * node_seconds, 0.0)
            gains[at] = gain
        for _ in range(min(beam, num_candidates)):
            best = np.argmax(gains)
            if not gains[best] > 0.0:
                break
            chosen[req, best] = True
            total += gains[best]
            gains[best] = -1.0
    if not total > price * level_seconds:
        chosen[:] = False
    return chosen


@compiled("void(f8[:,:,:,:], i8[:], i8, i8[:,:], f8[:,:], f8[:,:,:])")
def inherit(
    continuation,  # [num_kinds, max_depth + 1, num_strata, top_k] moved towards what was seen
    kinds,  # [num_reqs]
    depth,
    strata,  # [num_reqs, width] of the parents
    survivals,  # [num_reqs, width] of the parents, 0 where there is none
    children,  # [num_reqs, width, top_k] survivals
):
    """What children inherited of their parents' survival, each parent weighted by how much it mattered."""
    num_strata, top_k = continuation.shape[2], continuation.shape[3]
    moved = np.zeros((continuation.shape[0], num_strata, top_k), np.float64)
    total = np.zeros((continuation.shape[0], num_strata), np.float64)
    for req in range(survivals.shape[0]):
        for place in range(survivals.shape[1]):
            survival = survivals[req, place]
            if survival > 0.0:
                weight = 0.1 * survival
                total[kinds[req], strata[req, place]] += weight
                for rank in range(top_k):
                    share = children[req, place, rank] / max(survival, 1e-6)
                    moved[kinds[req], strata[req, place], rank] += weight * share
    for kind in range(continuation.shape[0]):
        for stratum in range(num_strata):
            weight = total[kind, stratum]
            if weight > 0.0:
                for rank in range(top_k):
                    mean = moved[kind, stratum, rank] / weight
                    held = continuation[kind, depth, stratum, rank]
                    continuation[kind, depth, stratum, rank] = held + min(weight, 0.5) * (
                        mean - held
                    )


@compiled("Tuple((i8[::1], i8, f8, f8))(f8[:,:], i8[:], f8[:], f8)")
def best_prefix(
    survivals,  # [num_reqs, max_nodes] falling along each row
    limits,  # [num_reqs]
    cost,  # [max_total + 1] seconds with that many nodes
    own_tokens,  # tokens that the batch emits without any node
):
    """[num_reqs] nodes, their sum, expected tokens and rate of the best prefix of all survivals sorted."""
    num_reqs, width = survivals.shape
    flat = np.empty(num_reqs * width, np.float64)
    owner = np.empty(num_reqs * width, np.int64)
    count = 0
    for req in range(num_reqs):
        for at in range(min(limits[req], width)):
            flat[count] = -survivals[req, at]
            owner[count] = req
            count += 1
    order = np.argsort(flat[:count], kind="mergesort")
    tokens = own_tokens
    best_tokens, best_rate, best = tokens, tokens / cost[0], 0
    for place in range(min(count, cost.size - 1)):
        tokens -= flat[order[place]]
        rate = tokens / cost[place + 1]
        if rate > best_rate:
            best_tokens, best_rate, best = tokens, rate, place + 1
    num_nodes = np.zeros(num_reqs, np.int64)
    for place in range(best):
        num_nodes[owner[order[place]]] += 1
    return num_nodes, best, best_tokens, best_rate


@compiled("i8[::1](f8[:,:], i8[:], i8)")
def within(
    survivals,  # [num_reqs, num_candidates] falling, 0 where there is none
    limits,  # [num_reqs]
    wanted,
):
    """[num_reqs] nodes that are wanted, allowed and there."""
    out = np.empty(limits.size, np.int64)
    for req in range(limits.size):
        most = min(limits[req], wanted, survivals.shape[1])
        count = 0
        while count < most and survivals[req, count] > 0.0:
            count += 1
        out[req] = count
    return out


@compiled("void(f8[::1], f8[:,:], f8)")
def smooth(
    curve,  # [max_nodes], moved
    survivals,  # [num_reqs, num_candidates], num_reqs >= 1
    rate,
):
    """Moves a mean curve towards the mean survival of each request's i-th best candidate, 0 where there is none."""
    num_reqs = survivals.shape[0]
    mean = np.zeros(curve.size, np.float64)
    for req in range(num_reqs):
        best = np.sort(survivals[req])[::-1]
        for place in range(min(curve.size, best.size)):
            mean[place] += best[place] / num_reqs
    for place in range(curve.size):
        curve[place] += rate * (mean[place] - curve[place])


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
        *best_prefix(
            np.asarray(survivals, dtype=np.float64), limits, cost, float(num_reqs + other_reqs)
        )
    )


def nodes_worth_expanding(
    survivals: Floats,  # [num_reqs, num_candidates] of one level, <= 0 where there is none
    strata: Ints,  # [num_reqs, num_candidates]
    kinds: Ints,  # [num_reqs]
    continuation: Floats,  # [num_kinds, num_strata, top_k] expected S(child) / S(node), by the child's rank
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
    return worth_expanding(
        np.asarray(survivals, dtype=np.float64),
        strata,
        kinds,
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


def hysteresis(on: bool, gain: float, *, start: float, stop: float) -> bool:
    """Whether to speculate: starts above ``start``, stops below ``stop`` (ratios to plain decoding's rate)."""
    return gain >= (stop if on else start)
