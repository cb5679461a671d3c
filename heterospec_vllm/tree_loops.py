# SPDX-License-Identifier: Apache-2.0
"""Compiled loops over the rows of draft trees: cutting, taking, laying out, masks. ``tree.py`` says what they mean.

The fields of ``DraftTrees`` come and go in its own order.
"""

from __future__ import annotations

import numpy as np

from heterospec_vllm.compiled import NO_ROW, compiled

_TREES = (
    "Tuple((i8[:,::1], i8[:,::1], i8[:,::1], i8[:,::1], i8[::1], f4[:,::1], f4[:,::1], i8[:,::1]))"
)


@compiled(_TREES + "(i8, i8)")
def empty(num_reqs, width):
    """The fields of ``DraftTrees`` without a node."""
    return (
        np.full((num_reqs, width), NO_ROW, np.int64),
        np.full((num_reqs, width + 1), NO_ROW, np.int64),
        np.zeros((num_reqs, width + 1), np.int64),
        np.zeros((num_reqs, width + 1), np.int64),
        np.zeros(num_reqs, np.int64),
        np.zeros((num_reqs, width), np.float32),
        np.zeros((num_reqs, width), np.float32),
        np.zeros((num_reqs, width), np.int64),
    )


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


@compiled(_TREES + "(i8[:,:], f4[:,:], f8[:,:], i8[:,:], i8[:,:], i8[:,:], i8[:,:], i8[:], i8)")
def cut(
    tokens,  # [num_reqs, pool_size], likewise the next five
    log_probs,
    survivals,
    strata,
    parents,
    ranks,
    order,  # [num_reqs, >= width] columns, best first
    limits,  # [num_reqs]
    width,
):
    """The fields of ``DraftTrees`` cut out of a pool; nodes without a survival end a tree."""
    num_reqs, pool_size = tokens.shape
    trees = empty(num_reqs, width)
    out_tokens, out_parents, out_depths, out_ranks, out_num_nodes = trees[:5]
    out_log_probs, out_survivals, out_strata = trees[5:]
    row_of = np.empty(pool_size, np.int64)
    for req in range(num_reqs):
        row_of[:] = NO_ROW
        present = 0
        for place in range(width):
            present += survivals[req, order[req, place]] > 0.0
        count = min(limits[req], present)
        out_num_nodes[req] = count
        for place in range(count):
            column = order[req, place]
            row_of[column] = place + 1
            parent = parents[req, column]
            above = 0 if parent < 0 else row_of[parent]
            out_tokens[req, place] = tokens[req, column]
            out_parents[req, place + 1] = above
            out_depths[req, place + 1] = out_depths[req, above] + 1
            out_ranks[req, place + 1] = ranks[req, column]
            out_log_probs[req, place] = log_probs[req, column]
            out_survivals[req, place] = survivals[req, column]
            out_strata[req, place] = strata[req, column]
    return trees


_FIELDS = "i8[:,:], i8[:,:], i8[:,:], i8[:,:], i8[:], f4[:,:], f4[:,:], i8[:,:]"


@compiled(f"{_TREES}({_FIELDS}, i8[:], i8[:])")
def take(
    tokens,  # the fields of DraftTrees
    parents,
    depths,
    ranks,
    _,
    log_probs,
    survivals,
    strata,
    reqs,  # [num_reqs']
    num_nodes,  # [num_reqs']
):
    """The trees of some requests, each cut to a prefix."""
    count = reqs.size
    width = 0
    for i in range(count):
        width = max(width, num_nodes[i])
    trees = empty(count, width)
    out_tokens, out_parents, out_depths, out_ranks, out_num_nodes = trees[:5]
    out_log_probs, out_survivals, out_strata = trees[5:]
    for i in range(count):
        req = reqs[i]
        out_num_nodes[i] = num_nodes[i]
        for place in range(num_nodes[i]):
            out_tokens[i, place] = tokens[req, place]
            out_parents[i, place + 1] = parents[req, place + 1]
            out_depths[i, place + 1] = depths[req, place + 1]
            out_ranks[i, place + 1] = ranks[req, place + 1]
            out_log_probs[i, place] = log_probs[req, place]
            out_survivals[i, place] = survivals[req, place]
            out_strata[i, place] = strata[req, place]
    return trees


@compiled(f"{_TREES}({_FIELDS})")
def lay_out(tokens, parents, depths, ranks, num_nodes, log_probs, survivals, strata):
    """The same trees with the meta-path in the rows that follow the root, the rest in the order it was."""
    num_reqs, width = tokens.shape
    trees = empty(num_reqs, width)
    out_tokens, out_parents, out_depths, out_ranks, out_num_nodes = trees[:5]
    out_log_probs, out_survivals, out_strata = trees[5:]
    new_row = np.zeros(width + 1, np.int64)
    for req in range(num_reqs):
        count = out_num_nodes[req] = num_nodes[req]
        new_row[:] = 0
        current = next_row = 0
        for row in range(1, count + 1):  # a parent comes first, so its best child follows later
            if parents[req, row] == current:
                next_row += 1
                new_row[row] = next_row
                current = row
        for row in range(1, count + 1):
            if new_row[row] == 0:
                next_row += 1
                new_row[row] = next_row
        for row in range(1, count + 1):
            to = new_row[row]
            out_parents[req, to] = new_row[parents[req, row]]
            out_depths[req, to] = depths[req, row]
            out_ranks[req, to] = ranks[req, row]
            out_tokens[req, to - 1] = tokens[req, row - 1]
            out_log_probs[req, to - 1] = log_probs[req, row - 1]
            out_survivals[req, to - 1] = survivals[req, row - 1]
            out_strata[req, to - 1] = strata[req, row - 1]
    return trees


@compiled("b1[::1](i8[:,:], i8[:])")
def chains(
    parents,  # [num_reqs, max_nodes + 1]
    num_nodes,  # [num_reqs]
):
    """[num_reqs] whether every node is the child of the row before it."""
    out = np.ones(num_nodes.size, np.bool_)
    for req in range(num_nodes.size):
        for row in range(1, num_nodes[req] + 1):
            if parents[req, row] != row - 1:
                out[req] = False
    return out


@compiled(
    "Tuple((i8[::1], i4[::1], i4[::1], i8[::1], i8[::1]))"
    "(i8[:,:], i8[:,:], i8[:], i8[:], i8[:], i8)"
)
def place(
    parents,  # [num_reqs, max_nodes + 1]
    depths,  # [num_reqs, max_nodes + 1]
    num_nodes,  # [num_reqs]
    starts,  # [num_reqs + 1] where each request's rows of the step start
    context_lens,  # [num_reqs] tokens before them
    longest,  # rows of a piece of text
):
    """The fields of ``PlacedRows``."""
    num_reqs = num_nodes.size
    num_pieces = 0
    for req in range(num_reqs):
        text = starts[req + 1] - starts[req]
        if num_nodes[req] > 0:
            text -= num_nodes[req] + 1
            num_pieces += 1
        num_pieces += (text + longest - 1) // longest
    positions = np.empty(starts[num_reqs], np.int64)
    piece_starts = np.zeros(num_pieces + 1, np.int32)
    seq_lens = np.empty(num_pieces, np.int32)
    reqs = np.empty(num_pieces, np.int64)
    masks = np.empty(starts[num_reqs], np.int64)
    piece = 0
    for req in range(num_reqs):
        nodes = num_nodes[req]
        row, context = starts[req], context_lens[req]
        root = starts[req + 1] - nodes - 1 if nodes > 0 else starts[req + 1]
        while row < root:
            count = min(longest, root - row)
            seen = 0
            for i in range(count):
                seen |= 1 << i
                positions[row + i] = context + i
                masks[row + i] = seen
            row += count
            context += count
            reqs[piece] = req
            piece_starts[piece + 1] = row
            seq_lens[piece] = context
            piece += 1
        if nodes > 0:
            positions[root] = context
            masks[root] = 1
            for i in range(1, nodes + 1):
                positions[root + i] = context + depths[req, i]
                masks[root + i] = masks[root + parents[req, i]] | (1 << i)
            reqs[piece] = req
            piece_starts[piece + 1] = root + nodes + 1
            seq_lens[piece] = context + nodes + 1
            piece += 1
    return positions, piece_starts, seq_lens, masks, reqs


# ---- after the walk


@compiled("i8[::1](i8[:,:], i8[:,:], i8[:], i8[:], i8[:])")
def children_matching(
    parents,  # [num_reqs, max_nodes + 1]
    tokens,  # [num_reqs, max_nodes]
    reqs,  # [num_active]
    rows,  # [num_active]
    emitted,  # [num_active]
):
    """[num_active] the child row of a request's row that carries a token, NO_ROW where there is none."""
    out = np.full(reqs.size, NO_ROW, np.int64)
    for i in range(reqs.size):
        req = reqs[i]
        for row in range(rows[i] + 1, parents.shape[1]):  # parents come first
            if parents[req, row] == rows[i] and tokens[req, row - 1] == emitted[i]:
                out[i] = row
                break
    return out


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
    temperatures,  # [num_reqs]
):
    """[num_verified] of every node: log-probability, depth, stratum, temperature, 1 where the walk came by."""
    count = num_nodes.sum()
    out_log_probs = np.empty(count, np.float64)
    out_depths = np.empty(count, np.int64)
    out_strata = np.empty(count, np.int64)
    out_temperatures = np.empty(count, np.int64)
    accepted = np.zeros(count, np.float64)
    start = 0
    for req in range(num_nodes.size):
        for place in range(num_nodes[req]):
            out_log_probs[start + place] = log_probs[req, place]
            out_depths[start + place] = depths[req, place + 1]
            out_strata[start + place] = strata[req, place]
            out_temperatures[start + place] = temperatures[req]
        for row in visited[req]:
            if row > 0:
                accepted[start + row - 1] = 1.0
        start += num_nodes[req]
    return out_log_probs, out_depths, out_strata, out_temperatures, accepted


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
