# SPDX-License-Identifier: Apache-2.0
"""Attention of a draft level on CPU: paged context plus a few rows of a scratch (C++, csrc/)."""

import torch

from .tree_attention import launch, pack_layer, pack_requests, tail_of


def draft_attention_cpu(
    # [num_tokens, num_heads, head_size]; rows may be strided, the last dimension not
    query: torch.Tensor,
    # [num_blocks, num_kv_heads, block_size, head_size]: vLLM's key half of a cache
    key_cache: torch.Tensor,
    # [num_blocks, num_kv_heads, block_size, head_size]
    value_cache: torch.Tensor,
    # [num_tokens, num_heads, head_size], written
    output: torch.Tensor,
    # [num_reqs + 1], int32
    query_start_loc: torch.Tensor,
    # [num_reqs], int32, >= 1: paged keys, seen by every row of the request
    context_lens: torch.Tensor,
    # [num_reqs, max_blocks], int32; rows may be strided
    block_table: torch.Tensor,
    # [num_scratch_rows, num_kv_heads, head_size], contiguous
    scratch_key: torch.Tensor,
    # [num_scratch_rows, num_kv_heads, head_size], contiguous
    scratch_value: torch.Tensor,
    # [num_tokens, max_tail], int32: scratch rows that a row sees, packed in front, -1 padded
    tail_index: torch.Tensor,
    scale: float,
    *,
    isa: str = "vec",
) -> None:
    """Attends tree nodes of a draft head to their request's pages and to their ancestors' scratch.

    The layout of the pages (`isa`) is that of `tree_attention_cpu`. Called once a layer and level, so only
    what would be read wrongly without a trace is checked.

    Raises:
        LibraryUnavailable: the kernel cannot be built.
    """
    assert tail_index.shape[0] == query.shape[0]
    assert scratch_key.dtype == scratch_value.dtype == query.dtype
    assert key_cache.dtype == value_cache.dtype == query.dtype
    tail = tail_of(scratch_key, scratch_value, tail_index)
    launch(
        pack_layer(key_cache, value_cache, query.shape[1], query.shape[2], scale, isa=isa),
        pack_requests(query_start_loc, context_lens, block_table, 0, tail=tail),
        query,
        output,
    )
