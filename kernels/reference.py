# SPDX-License-Identifier: Apache-2.0
"""The truth that every tree attention kernel is tested against: plain PyTorch in float64."""

import torch


def paged_keys_values(
    # [num_blocks, num_kv_heads, block_size, head_size], `vec` layout
    key_cache: torch.Tensor,
    # [num_blocks, num_kv_heads, block_size, head_size]
    value_cache: torch.Tensor,
    # [max_blocks], int32
    blocks: torch.Tensor,
    seq_len: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gathers one request's keys and values, each [num_kv_heads, seq_len, head_size], float64."""
    _, num_kv_heads, block_size, head_size = key_cache.shape
    used = blocks[: -(-seq_len // block_size)].long()
    # The memory of a block's keys is [head_size, block_size], whatever the tensor's shape says.
    keys = key_cache[used].reshape(-1, num_kv_heads, head_size, block_size)
    keys = keys.permute(1, 0, 3, 2).reshape(num_kv_heads, -1, head_size)
    values = value_cache[used].permute(1, 0, 2, 3).reshape(num_kv_heads, -1, head_size)
    return keys[:, :seq_len].double(), values[:, :seq_len].double()


def tree_attention(
    # [num_tokens, num_heads, head_size]
    query: torch.Tensor,
    # [num_blocks, num_kv_heads, block_size, head_size], `vec` layout
    key_cache: torch.Tensor,
    # [num_blocks, num_kv_heads, block_size, head_size]
    value_cache: torch.Tensor,
    # [num_tokens, num_heads, head_size], written
    output: torch.Tensor,
    # [num_reqs + 1], int32
    query_start_loc: torch.Tensor,
    # [num_reqs], int32
    seq_lens: torch.Tensor,
    # [num_reqs, max_blocks], int32
    block_table: torch.Tensor,
    # [num_tokens], int64
    ancestor_mask: torch.Tensor,
    scale: float,
) -> None:
    """What `tree_attention_cpu` computes (same arguments), one row at a time.

    Each row takes only the keys it sees, so nothing a hidden slot holds can reach it.
    """
    group = query.shape[1] // key_cache.shape[1]
    starts = query_start_loc.tolist()
    for req, seq_len in enumerate(seq_lens.tolist()):
        first, end = starts[req], starts[req + 1]
        if first == end:
            continue
        keys, values = paged_keys_values(key_cache, value_cache, block_table[req], seq_len)
        context = seq_len - (end - first)
        for row in range(first, end):
            tree = int(ancestor_mask[row]) & (2**64 - 1)
            seen = [*range(context), *(context + j for j in range(end - first) if tree >> j & 1)]
            row_keys = keys[:, seen].repeat_interleave(group, dim=0)
            row_values = values[:, seen].repeat_interleave(group, dim=0)
            scores = torch.einsum("hd,hkd->hk", query[row].double(), row_keys) * scale
            weights = scores.softmax(dim=-1)
            output[row] = torch.einsum("hk,hkd->hd", weights, row_values).to(output.dtype)
