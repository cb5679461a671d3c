# SPDX-License-Identifier: Apache-2.0
"""Compiled loops over rows: of the head's passes, of the step, of the pages. Pure functions of arrays.

``tree_drafter.py``, ``drafter.py``, ``true_tokens.py``, ``cache.py`` and ``runners/step.py`` say what they mean.
"""

from __future__ import annotations

import numpy as np

from heterospec_vllm.compiled import NO_ROW, compiled


@compiled(
    "Tuple((i8[:,::1], f4[:,::1], f8[:,::1], f4[:,::1], i8[:,::1], i8[:,::1], i8[::1], i8[::1], i8[::1],"
    " i4[::1], i4[:,::1]))"
    "(b1[:,:], i8[:,:], i8[:,:], f4[:,:], f8[:,:], f4[:,:], i8[:,:], i8, i4[:,:], i8)"
)
def frontier(
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
    positions,  # [num_reqs] of the last true token
    reqs,  # [num_rows]
    level,
    last,
):
    """[num_rows] positions of nodes ``level`` behind the true tokens, at most ``last``."""
    out = np.empty(reqs.size, np.int64)
    for row in range(reqs.size):
        out[row] = min(positions[reqs[row]] + level, last)
    return out


@compiled("Tuple((i8[::1], f8))(i8[:], i8[:])")
def firsts_and_context(
    num_tokens,  # [num_reqs]
    positions,  # [num_tokens]
):
    """[num_reqs] position of each request's first token; the sum of those of the last ones."""
    firsts = np.empty(num_tokens.size, np.int64)
    context = 0.0
    start = 0
    for req in range(num_tokens.size):
        firsts[req] = positions[start]
        start += num_tokens[req]
        context += positions[start - 1]
    return firsts, context


@compiled("i8[::1](i4[:], i4[:], i4[:])")
def prompt_left(
    num_prompt_tokens,  # [num_reqs]
    num_computed_tokens,  # [num_reqs or more] before the step
    query_start_loc,  # [num_reqs + 1 or more]
):
    """[num_reqs] tokens of each prompt that later steps read."""
    out = np.empty(num_prompt_tokens.size, np.int64)
    for req in range(out.size):
        done = num_computed_tokens[req] + query_start_loc[req + 1] - query_start_loc[req]
        out[req] = max(0, num_prompt_tokens[req] - done)
    return out


@compiled("i8(i4[:,:], i8, i8, i8)")
def _block(block_table, req, offset, block_size):
    """KV block of a request's token."""
    column = offset // block_size
    assert column < block_table.shape[1]  # compiled code would read on
    return block_table[req, column]


@compiled("i8[::1](i8[:], i8[:], i4[:,:], i8)")
def true_blocks(
    num_tokens,  # [num_reqs]
    offsets,  # [num_tokens] from the start of the head's context
    block_table,  # [num_reqs, max_blocks] from there
    block_size,
):
    """[num_tokens] KV block of each."""
    blocks = np.empty(offsets.size, np.int64)
    row = 0
    for req in range(num_tokens.size):
        for _ in range(num_tokens[req]):
            blocks[row] = _block(block_table, req, offsets[row], block_size)
            row += 1
    return blocks


@compiled(
    "Tuple((i4[::1], i4[::1], i4[:,::1], i8[::1], i8[::1], i4[::1]))"
    "(i8[::1], i8[::1], i4[:,:], i8, i4[:], i4[:])"
)
def true_rows(
    num_tokens,  # [num_reqs]
    offsets,  # [num_tokens] from the start of the head's context, rising by one within a request
    block_table,  # [num_reqs, max_blocks] from there
    block_size,
    token_ids,  # [num_tokens]
    next_token_ids,  # [num_reqs] that follow each request's last one
):
    """True tokens as rows of a level that is a chain: each with the token that followed it.

    [num_reqs + 1] where each request's rows start; [num_reqs] keys before them; [num_tokens, longest] rows of the
    same request up to each one (NO_ROW padded); [num_tokens] slot in the pages and next token; [num_reqs] keys of the
    request with its rows.
    """
    num_reqs = num_tokens.size
    start = np.zeros(num_reqs + 1, np.int32)
    context_lens = np.empty(num_reqs, np.int32)
    seq_lens = np.empty(num_reqs, np.int32)
    longest = 0
    for req in range(num_reqs):
        start[req + 1] = start[req] + num_tokens[req]
        longest = max(longest, num_tokens[req])
        context_lens[req] = offsets[start[req]]
        seq_lens[req] = context_lens[req] + num_tokens[req]
    before = np.full((start[num_reqs], longest), NO_ROW, np.int32)
    slots = np.empty(start[num_reqs], np.int64)
    following = np.empty(start[num_reqs], np.int64)
    for req in range(num_reqs):
        last = start[req + 1] - 1
        for row in range(start[req], start[req + 1]):
            for i in range(row - start[req] + 1):
                before[row, i] = start[req] + i
            block = _block(block_table, req, offsets[row], block_size)
            slots[row] = block * block_size + offsets[row] % block_size
            following[row] = next_token_ids[req] if row == last else token_ids[row + 1]
    return start, context_lens, before, slots, following, seq_lens


@compiled("Tuple((i8[::1], i8[::1]))(i8[:,:], i8[:])")
def moves(
    rows,  # [num_reqs, max_emitted] visited rows of each tree, NO_ROW beyond
    root_rows,  # [num_reqs]
):
    """[num_moves] each: rows of the step that are not where their depth belongs, and where that is."""
    num_reqs, width = rows.shape
    sources = np.empty(rows.size, np.int64)
    targets = np.empty(rows.size, np.int64)
    count = 0
    for req in range(num_reqs):
        for depth in range(width):
            if rows[req, depth] > depth:
                sources[count] = root_rows[req] + rows[req, depth]
                targets[count] = root_rows[req] + depth
                count += 1
    return sources[:count], targets[:count]


@compiled("Tuple((i8[::1], i8[::1]))(i8[:], i8[:], i8[:,:], i8[:])")
def walked_rows(
    starts,  # [num_reqs + 1] where each request's rows of the step start
    root_rows,  # [num_reqs]
    rows,  # [num_reqs, max_emitted] visited rows of each tree
    num_emitted,  # [num_reqs]
):
    """The step's rows that hold true tokens: those before each root and the visited ones; their number by request."""
    num_reqs = root_rows.size
    num_tokens = np.empty(num_reqs, np.int64)
    total = 0
    for req in range(num_reqs):
        num_tokens[req] = root_rows[req] - starts[req] + num_emitted[req]
        total += num_tokens[req]
    out = np.empty(total, np.int64)
    at = 0
    for req in range(num_reqs):
        for row in range(starts[req], root_rows[req]):
            out[at] = row
            at += 1
        for depth in range(num_emitted[req]):
            out[at] = root_rows[req] + rows[req, depth]
            at += 1
    return out, num_tokens
