# SPDX-License-Identifier: Apache-2.0
"""The rows of a batch in a step: where each tree and each text lies, and what its rows attend to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from heterospec_vllm.arrays import Ints, Ints32
from heterospec_vllm.compiled import compiled


@dataclass(frozen=True)
class PlacedRows:
    """The rows of a batch in a step, request by request, in pieces that attend by a mask.

    A tree is one piece, the text before it or without one as many as it takes, each with those before it as context.
    """

    positions: Ints  # [num_rows] they follow the depth
    query_start_loc: Ints32  # [num_pieces + 1]
    seq_lens: Ints32  # [num_pieces] the context and the rows
    ancestor_mask: Ints  # [num_rows] bit j: sees row j of its own piece
    reqs: Ints  # [num_pieces] request of each


@compiled(
    "Tuple((i8[::1], i4[::1], i4[::1], i8[::1], i8[::1]))"
    "(i8[:,:], i8[:,:], i8[:], i8[:], i8[:], i8)"
)
def place_rows(
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
