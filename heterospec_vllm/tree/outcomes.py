# SPDX-License-Identifier: Apache-2.0
"""Compiled loops over walked trees: what became of every verified node."""

from __future__ import annotations

import numpy as np

from heterospec_vllm.compiled import compiled


@compiled(
    "Tuple((f8[::1], i8[::1], i8[::1], i8[::1], f8[::1]))"
    "(f4[:,:], i8[:,:], i8[:,:], i8[:], i8[:,:], i8[:])"
)
def outcomes(
    log_probs,  # [num_reqs, max_nodes]
    depths,  # [num_reqs, max_nodes + 1]
    strata,  # [num_reqs, max_nodes]
    num_nodes,  # [num_reqs]
    visited,  # [num_reqs, max_emitted] rows of the walk, NO_ROW beyond
    kinds,  # [num_reqs]
):
    """[num_verified] of every node: log-probability, depth, stratum, kind, 1 where the walk came by."""
    count = num_nodes.sum()
    out_log_probs = np.empty(count, np.float64)
    out_depths = np.empty(count, np.int64)
    out_strata = np.empty(count, np.int64)
    out_kinds = np.empty(count, np.int64)
    accepted = np.zeros(count, np.float64)
    start = 0
    for req in range(num_nodes.size):
        for place in range(num_nodes[req]):
            out_log_probs[start + place] = log_probs[req, place]
            out_depths[start + place] = depths[req, place + 1]
            out_strata[start + place] = strata[req, place]
            out_kinds[start + place] = kinds[req]
        for row in visited[req]:
            if row > 0:
                accepted[start + row - 1] = 1.0
        start += num_nodes[req]
    return out_log_probs, out_depths, out_strata, out_kinds, accepted


@compiled(
    "Tuple((i8[:,::1], i8[::1], i8, i8, b1))(i8[:,:], i8[:,:], i8[:,:], i8[:], i8[:,:], i8[:,:], i8)"
)
def tally(
    parents,  # [num_reqs, max_nodes + 1], likewise the next two
    depths,
    ranks,
    num_nodes,  # [num_reqs]
    strata,  # [num_reqs, max_nodes]
    visited,  # [num_reqs, max_emitted] rows of the walk, NO_ROW beyond
    num_strata,
):
    """What a step's walk adds to the counters.

    [3, num_strata] nodes, trees and their depths by stratum (a tree has that of the end of its meta-path, which is laid
    out first), [max_emitted] accepted by depth, accepted nodes that were not their parent's first child, trees, and
    whether one of them is no chain.
    """
    by_stratum = np.zeros((3, num_strata), np.int64)
    by_depth = np.zeros(visited.shape[1], np.int64)
    others = num_trees = 0
    branches = False
    for req in range(num_nodes.size):
        count = num_nodes[req]
        for depth in range(1, visited.shape[1]):
            row = visited[req, depth]
            if row > 0:
                by_depth[depth] += 1
                others += ranks[req, row] > 0
        if count == 0:
            continue
        num_trees += 1
        end = deepest = 0
        for row in range(1, count + 1):
            by_stratum[0, strata[req, row - 1]] += 1
            deepest = max(deepest, depths[req, row])
            if parents[req, row] != row - 1:
                branches = True
            elif end == row - 1:
                end = row
        stratum = strata[req, max(end, 1) - 1]
        by_stratum[1, stratum] += 1
        by_stratum[2, stratum] += deepest
    return by_stratum, by_depth, others, num_trees, branches
