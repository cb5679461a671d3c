# SPDX-License-Identifier: Apache-2.0
"""Greedy walk of a batch of draft trees on CPU, logits read in their own dtype (C++, csrc/)."""

import struct

import torch

from .cpu_library import c_entry

_PACK = struct.Struct("=6q7Q").pack  # csrc/walk.hpp: WalkArguments
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def walk_greedy_cpu(
    # [num_logits, vocab_size], columns adjacent; float32, bfloat16 or float16
    logits: torch.Tensor,
    # [num_reqs], int64: the root's row; those of the nodes follow
    first_row: torch.Tensor,
    # [num_reqs, max_nodes + 1], int64: parent row, lower than the row itself; -1 for the root and beyond
    parents: torch.Tensor,
    # [num_reqs, max_nodes], int64: token of each node
    tokens: torch.Tensor,
    # at least the deepest node's depth + 1
    max_emitted: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """From each root: emit the row's argmax, go to the child that carries it, until there is none.

    (visited rows, emitted tokens), each [num_reqs, max_emitted] int64 with -1 beyond [num_reqs] int64, their number.
    Argmax as in `argmax_rows_cpu`: the first of equals, a NaN is the largest. Only visited rows are read.

    Raises:
        LibraryUnavailable: the kernel cannot be built.
    """
    num_reqs, max_nodes = tokens.shape
    assert logits.dtype in _DTYPES and logits.stride(1) == 1, (logits.dtype, logits.stride())
    assert first_row.shape == (num_reqs,) and parents.shape == (num_reqs, max_nodes + 1)
    assert max_emitted >= 1
    for given in (first_row, parents, tokens):
        assert given.dtype == torch.int64 and given.is_contiguous()
    rows = torch.empty((num_reqs, max_emitted), dtype=torch.int64)
    emitted, num_emitted = torch.empty_like(rows), torch.empty_like(first_row)
    failed = c_entry("heterospec_walk_greedy")(
        _PACK(
            logits.element_size(),
            num_reqs,
            max_nodes,
            max_emitted,
            logits.shape[1],
            logits.stride(0),
            logits.data_ptr(),
            first_row.data_ptr(),
            parents.data_ptr(),
            tokens.data_ptr(),
            rows.data_ptr(),
            emitted.data_ptr(),
            num_emitted.data_ptr(),
        )
    )
    assert not failed
    return rows, emitted, num_emitted
