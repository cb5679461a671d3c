# SPDX-License-Identifier: Apache-2.0
"""Pages as vLLM's isa "amx" lays them out, made of plain ones."""

import torch


def amx_pages(
    # [num_blocks, num_kv_heads, block_size, head_size], `vec` layout
    key_cache: torch.Tensor,
    # [num_blocks, num_kv_heads, block_size, head_size]
    value_cache: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same keys and values laid out as vLLM's isa "amx" does (csrc/pages.hpp), shapes unchanged."""
    num_blocks, num_kv_heads, block_size, head_size = key_cache.shape
    lead = (num_blocks, num_kv_heads)
    keys = key_cache.reshape(*lead, head_size // 2, 2, block_size // 16, 16)
    values = value_cache.reshape(*lead, block_size // 2, 2, head_size // 16, 16)
    tiled = [pages.permute(0, 1, 4, 2, 5, 3).reshape(key_cache.shape) for pages in (keys, values)]
    return tiled[0], tiled[1]
