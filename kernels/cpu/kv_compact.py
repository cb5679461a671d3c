# SPDX-License-Identifier: Apache-2.0
"""Moves accepted tokens' keys and values between slots of vLLM's pages (C++, csrc/)."""

from collections.abc import Sequence

import torch

from .library import c_entry
from .structs import STRUCTS
from .tree_attention import ISA_CODES

_PACK = STRUCTS["CompactArguments"].pack


def kv_compact_cpu(
    # layers, each [num_blocks, num_kv_heads, block_size, 2 * head_size], contiguous, alike
    kv_caches: Sequence[torch.Tensor],
    # [num_moves], int64 slots
    sources: torch.Tensor,
    # [num_moves], int64 slots; a target must not be a later source
    targets: torch.Tensor,
    *,
    isa: str = "vec",
) -> None:
    """Copies slot `sources[i]` to slot `targets[i]` in every layer, one move after the other.

    A (block, head) holds its keys and behind them its values, laid out by vLLM's `isa` as for
    `tree_attention_cpu`, whatever the tensor's shape says.

    Raises:
        LibraryUnavailable: the kernel cannot be built.
    """
    first = kv_caches[0]
    num_blocks, num_kv_heads, block_size, both = first.shape
    assert all(c.shape == first.shape and c.is_contiguous() for c in kv_caches)
    assert sources.dtype == targets.dtype == torch.int64
    assert sources.is_contiguous() and targets.is_contiguous() and sources.shape == targets.shape
    layers = torch.tensor([cache.data_ptr() for cache in kv_caches], dtype=torch.int64)
    failed = c_entry("heterospec_kv_compact")(
        _PACK(
            first.element_size(),
            ISA_CODES[isa],
            len(kv_caches),
            sources.shape[0],
            num_kv_heads,
            both // 2,
            block_size,
            first.stride(0),
            first.stride(1),
            layers.data_ptr(),
            sources.data_ptr(),
            targets.data_ptr(),
        )
    )
    assert not failed, f"element size {first.element_size()}, allowed: 2 or 4"
