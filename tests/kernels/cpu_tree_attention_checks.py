# SPDX-License-Identifier: Apache-2.0
"""What the CPU tree attention relies on, checked before the tests call it."""

import torch

from heterospec_vllm.kernels.cpu.library import DTYPE_CODES
from heterospec_vllm.kernels.cpu.tree_attention import (
    BLOCK_SIZE_MULTIPLE,
    MAX_ROWS,
    TreeAttentionInputs,
)
from heterospec_vllm.kernels.head_sizes import CPU_KERNELS


def check_inputs(inputs: TreeAttentionInputs, output: torch.Tensor) -> None:
    """Everything that `tree_attention_cpu` relies on and does not check; reads the small tensors.

    Raises:
        ValueError: names the argument, what was found and what is allowed.
    """
    pages, rows, query = inputs.pages, inputs.rows, inputs.query
    query_start_loc, seq_lens, block_table = rows.query_start_loc, rows.seq_lens, rows.block_table
    key_cache, ancestor_mask, scale = pages.key_cache, rows.ancestor_mask, pages.scale
    _check_tensors(query, key_cache, pages.value_cache, output)
    _require(query.shape[1] == pages.num_heads, "query.shape[1]", query.shape[1], pages.num_heads)
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
    _require(head_size in CPU_KERNELS, "query.shape[2]", head_size, list(CPU_KERNELS))
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
