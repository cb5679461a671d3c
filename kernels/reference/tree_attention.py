# SPDX-License-Identifier: Apache-2.0
"""The truth that the Triton tree attention is tested against: plain PyTorch in float64, one row at a time."""

import torch

MASK_64 = 2**64 - 1


def tree_attention_reference(
    # [num_tokens, num_heads, head_size]
    query: torch.Tensor,
    # [num_blocks, num_kv_heads, block_size, head_size], any strides
    key_cache: torch.Tensor,
    # [num_blocks, num_kv_heads, block_size, head_size], any strides
    value_cache: torch.Tensor,
    # [num_tokens, num_heads, head_size], written
    output: torch.Tensor,
    # [num_reqs + 1], int32
    query_start_loc: torch.Tensor,
    # [num_reqs], int32
    seq_lens: torch.Tensor,
    # [num_reqs, max_blocks], int32
    block_table: torch.Tensor,
    # [num_tokens] or [num_reqs, max_rows], int64
    ancestor_mask: torch.Tensor,
    scale: float,
    *,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    sliding_window: int = 0,
    soft_cap: float = 0.0,
) -> None:
    """What `tree_attention` computes (same arguments).

    Each row gathers only the slots it sees, so nothing a hidden slot holds can reach it.
    """
    key_factor = 1.0 if k_scale is None else float(k_scale)
    value_factor = 1.0 if v_scale is None else float(v_scale)
    starts = query_start_loc.tolist()
    for req, seq_len in enumerate(seq_lens.tolist()):
        first, num_rows = starts[req], starts[req + 1] - starts[req]
        rows = slice(first, first + num_rows)
        flat = ancestor_mask.dim() == 1
        request_masks = ancestor_mask[rows] if flat else ancestor_mask[req, :num_rows]
        masks = [mask & MASK_64 for mask in request_masks.tolist()]
        for row in range(num_rows):
            slots = visible_slots(masks, row, seq_len - num_rows, sliding_window)
            keys = _gathered(key_cache, block_table[req], slots) * key_factor
            values = _gathered(value_cache, block_table[req], slots) * value_factor
            output[first + row] = _attend(query[first + row], keys, values, scale, soft_cap)


def visible_slots(masks: list[int], row: int, context: int, sliding_window: int = 0) -> list[int]:
    """The slots of a request that one of its rows sees, rising.

    Args:
        masks: of the request's rows, unsigned; the number of bits set is a row's depth plus one.
        sliding_window: keys a row sees at most along its path, itself included; 0: all.
    """
    depths = [mask.bit_count() - 1 for mask in masks]
    tree = [other for other in range(len(masks)) if masks[row] >> other & 1]
    positions = [*range(context), *(context + depths[other] for other in tree)]
    slots = [*range(context), *(context + other for other in tree)]
    if not sliding_window:
        return slots
    oldest = context + depths[row] - sliding_window
    return [slot for slot, at in zip(slots, positions, strict=True) if at > oldest]


def _gathered(
    # [num_blocks, num_kv_heads, block_size, head_size]
    cache: torch.Tensor,
    # [max_blocks], int32
    blocks: torch.Tensor,
    slots: list[int],
) -> torch.Tensor:
    """[num_kv_heads, num_slots, head_size], float64."""
    at = torch.tensor(slots, device=cache.device)
    block_size = cache.shape[2]
    # One byte wide floats cannot be indexed everywhere.
    bits = cache.view(torch.uint8) if cache.element_size() == 1 else cache
    rows = bits[blocks[at // block_size].long(), :, at % block_size]
    return rows.view(cache.dtype).double().transpose(0, 1)


def _attend(
    # [num_heads, head_size]
    query: torch.Tensor,
    # [num_kv_heads, num_slots, head_size]
    keys: torch.Tensor,
    # [num_kv_heads, num_slots, head_size]
    values: torch.Tensor,
    scale: float,
    soft_cap: float,
) -> torch.Tensor:
    """[num_heads, head_size] in the query's dtype."""
    grouped = query.double().unflatten(0, (keys.shape[0], -1))
    scores = torch.einsum("ngd,nkd->ngk", grouped, keys) * scale
    if soft_cap:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    weights = scores.softmax(dim=-1)
    return torch.einsum("ngk,nkd->ngd", weights, values).flatten(0, 1).to(query.dtype)
