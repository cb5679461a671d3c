# SPDX-License-Identifier: Apache-2.0
"""Compiled loops over the nodes of a draft level: what grows, what it is expected to survive, what is taken of it.

Pure functions of arrays; ``growth.py``, ``survival.py``, ``policy.py`` and ``marginal.py`` say what they mean.
"""

from __future__ import annotations

import math

import numpy as np

from heterospec_vllm.compiled import compiled


@compiled("f8(f4[:])")
def _entropy(log_probs):
    """Entropy of the renormalised top-k; 0 where nothing is finite."""
    top = -np.inf
    for value in log_probs:
        if np.isfinite(value) and value > top:
            top = value
    if top == -np.inf:
        return 0.0
    total = weighted = 0.0
    for value in log_probs:
        shifted = value - top
        weight = math.exp(shifted)
        total += weight
        if weight > 0.0:
            weighted += weight * shifted
    return max(math.log(total) - weighted / total, 0.0)


@compiled("f4[::1](f4[:,:])")
def entropies(log_probs):
    """[num_rows] entropy of each row's renormalised top-k."""
    out = np.empty(log_probs.shape[0], np.float32)
    for row in range(out.size):
        out[row] = _entropy(log_probs[row])
    return out


@compiled("Tuple((i8, f8))(f8[:], f8)")
def _place(knots, log_prob):
    """The knot below a log path probability and how far it is on the way to the next; NaN counts as the lowest."""
    last = knots.size - 1
    x = knots[0] if math.isnan(log_prob) else min(max(log_prob, knots[0]), knots[last])
    low = min(np.searchsorted(knots, x, side="right") - 1, last - 1)
    return low, (x - knots[low]) / (knots[low + 1] - knots[low])


@compiled("f8(f8[:,:,:,:], f8[:], f8, i8, i8, i8)")
def _survival(table, knots, log_prob, depth, stratum, temperature):
    """Linear between the knots around a log path probability."""
    low, share = _place(knots, log_prob)
    cell = table[temperature, min(depth, table.shape[1]) - 1, stratum]
    return cell[low] + share * (cell[low + 1] - cell[low])


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
                entropy = np.float32(entropies[req, place] + _entropy(local[row]))
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


@compiled("f8[:,::1](f8[:,:,:,:], f8[:], f4[:,:], i8, i8[:,:], i8[:], f8[:,:])")
def level_survivals(
    table,  # [num_temperatures, max_depth, num_strata, num_knots]
    knots,  # [num_knots]
    log_probs,  # [num_reqs, num_candidates]
    depth,
    strata,  # [num_reqs, num_candidates]
    temperatures,  # [num_reqs]
    parents,  # [num_reqs, num_candidates] their parents' survivals
):
    """[num_reqs, num_candidates] never above the parent's; 0 where absent (-inf, NaN)."""
    out = np.zeros(log_probs.shape, np.float64)
    for req in range(log_probs.shape[0]):
        for at in range(log_probs.shape[1]):
            value = log_probs[req, at]
            if value > -np.inf:
                own = _survival(table, knots, value, depth, strata[req, at], temperatures[req])
                out[req, at] = min(own, parents[req, at])
    return out


@compiled("f8[::1](f8[:,:,:,:], f8[:], f8[:], i8[:], i8[:], i8[:])")
def node_survivals(table, knots, log_probs, depths, strata, temperatures):
    """[num_nodes] each on its own."""
    out = np.empty(log_probs.size, np.float64)
    for i in range(log_probs.size):
        out[i] = _survival(table, knots, log_probs[i], depths[i], strata[i], temperatures[i])
    return out


@compiled("void(f8[:,:,:,:], f8[:,:,:,:], f8[:], f8[:], i8[:], i8[:], i8[:], f8[:])")
def count_outcomes(
    hits,  # [num_temperatures, max_depth, num_strata, num_knots] added to, like trials
    trials,
    knots,
    log_probs,  # [num_nodes], likewise the others
    depths,
    strata,
    temperatures,
    accepted,
):
    """Shares every outcome among the two knots around it."""
    for i in range(accepted.size):
        low, share = _place(knots, log_probs[i])
        depth = min(depths[i], hits.shape[1]) - 1
        for knot, part in ((low, 1.0 - share), (low + 1, share)):
            trials[temperatures[i], depth, strata[i], knot] += part
            hits[temperatures[i], depth, strata[i], knot] += part * accepted[i]


@compiled("b1[:,::1](f8[:,:], i8[:,:], i8[:], f8[:,:,:], f8, f8, f8, f8, i8)")
def worth_expanding(
    survivals,  # [num_reqs, num_candidates] <= 0 where there is none
    strata,  # [num_reqs, num_candidates]
    temperatures,  # [num_reqs]
    continuation,  # [num_temperatures, num_strata, top_k]
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
                shares = continuation[temperatures[req], strata[req, at]]
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
    continuation,  # [num_temperatures, max_depth + 1, num_strata, top_k] moved towards what was seen
    temperatures,  # [num_reqs]
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
                total[temperatures[req], strata[req, place]] += weight
                for rank in range(top_k):
                    share = children[req, place, rank] / max(survival, 1e-6)
                    moved[temperatures[req], strata[req, place], rank] += weight * share
    for temperature in range(continuation.shape[0]):
        for stratum in range(num_strata):
            weight = total[temperature, stratum]
            if weight > 0.0:
                for rank in range(top_k):
                    mean = moved[temperature, stratum, rank] / weight
                    held = continuation[temperature, depth, stratum, rank]
                    continuation[temperature, depth, stratum, rank] = held + min(weight, 0.5) * (
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
