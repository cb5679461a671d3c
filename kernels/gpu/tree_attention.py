# SPDX-License-Identifier: Apache-2.0
"""Tree attention on GPU over vLLM's paged KV cache: launcher and what is compiled ahead of time.

The contract and the mathematics are in `tree_attention_kernels.py`, tiles and refusals in `tree_attention_plan.py`,
the truth in `reference/tree_attention.py`. Launches per layer: one, two where a long context is split.
"""

from collections.abc import Iterator

import torch

from .aot_registry import AotConfig
from .tree_attention_kernels import tree_attention_kernel, tree_attention_sum_kernel
from .tree_attention_plan import (
    HEAD_SIZES,
    MIN_SHARE,
    TreeAttentionPlan,
    TreeAttentionWorkspace,
    check_arguments,
    interpreted,
    next_power_of_2,
    tile_for,
)


def tree_attention(
    # [num_tokens, num_heads, head_size]; the last dimension is dense
    query: torch.Tensor,
    # [num_blocks, num_kv_heads, block_size, head_size], any strides
    key_cache: torch.Tensor,
    # [num_blocks, num_kv_heads, block_size, head_size], any strides
    value_cache: torch.Tensor,
    # [num_tokens, num_heads, head_size], written; the last dimension is dense
    output: torch.Tensor,
    # [num_reqs + 1], int32
    query_start_loc: torch.Tensor,
    # [num_reqs], int32
    seq_lens: torch.Tensor,
    # [num_reqs, max_blocks], int32; rows may be strided
    block_table: torch.Tensor,
    # [num_tokens] or [num_reqs, max_rows], int64; rows may be strided
    ancestor_mask: torch.Tensor,
    scale: float,
    plan: TreeAttentionPlan,
    *,
    workspace: TreeAttentionWorkspace | None = None,
    # [1], float32, of an fp8 cache
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    sliding_window: int = 0,
    soft_cap: float = 0.0,
    checked: bool = False,
) -> None:
    """Attends each row to its request's context and to its own ancestors among the step's rows.

    A request's last `query_len` slots, `seq_len - query_len + j`, are the rows of this step, already stored. Row i sees
    all slots before them and row j where bit j of its mask is set (its own bit included; rows are parents first). A
    plain decode row is a tree of the root alone, mask 1. Masks are addressed as tokens or, with two dimensions, as
    (request, row). Requests without rows, requests with more than `plan.max_rows` rows (another backend's) and output
    rows of no request are left untouched. One launch, two if `plan.num_splits` is above 1. The contents of the tensors
    are not read on the host.

    Args:
        scale: what scores are multiplied by.
        plan: `TreeAttentionPlan.of` the batch's capacities.
        workspace: of `plan`, needed if it splits; may be reused by every layer of a stream.
        sliding_window: tokens a row sees at most along its path, itself included; 0: all.
        soft_cap: scores become `soft_cap * tanh(score / soft_cap)`; 0: as they are.
        checked: another layer's call of the same step, with tensors of the same shapes, strides and dtypes, went
            through. The checks take some 60 us on the host, more than the launch.

    Raises:
        ValueError: names the argument, what was found and what is allowed.
    """
    if not checked:
        check_arguments(
            query, key_cache, value_cache, output, query_start_loc, seq_lens, block_table,
            ancestor_mask, plan, workspace, k_scale, v_scale, sliding_window, soft_cap,
        )  # fmt: skip
    num_reqs, num_heads = seq_lens.shape[0], query.shape[1]
    if not num_reqs or not query.shape[0]:
        return
    _launch_tiles(
        query, plan.stored(key_cache), plan.stored(value_cache), output, query_start_loc,
        seq_lens, block_table, ancestor_mask, scale, plan, workspace, k_scale, v_scale,
        sliding_window, soft_cap,
    )  # fmt: skip
    if workspace is None or plan.num_splits == 1:
        return
    tree_attention_sum_kernel[(num_reqs * plan.max_rows, num_heads)](
        workspace.partial,
        workspace.lse,
        output,
        query_start_loc,
        workspace.lse if v_scale is None else v_scale,
        plan.max_rows,
        num_heads,
        output.stride(0),
        output.stride(1),
        HEAD_SIZE=plan.head_size,
        HEAD_PADDED=plan.head_padded,
        NUM_SPLITS=plan.num_splits,
        HAS_KV_SCALES=v_scale is not None,
        num_warps=4,
    )


def _launch_tiles(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    output: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    ancestor_mask: torch.Tensor,
    scale: float,
    plan: TreeAttentionPlan,
    workspace: TreeAttentionWorkspace | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    sliding_window: int,
    soft_cap: float,
) -> None:
    # What a configuration does not use is never dereferenced; a pointer has to be given all the same.
    unused = query_start_loc
    tree_attention_kernel[(seq_lens.shape[0] * plan.num_tiles, plan.num_kv_heads, plan.num_splits)](
        query,
        key_cache,
        value_cache,
        output,
        unused if workspace is None else workspace.partial,
        unused if workspace is None else workspace.lse,
        query_start_loc,
        seq_lens,
        block_table,
        ancestor_mask,
        unused if k_scale is None else k_scale,
        unused if v_scale is None else v_scale,
        scale,
        soft_cap,
        plan.max_rows,
        plan.num_tiles,
        query.shape[1],
        query.stride(0),
        query.stride(1),
        output.stride(0),
        output.stride(1),
        *key_cache.stride(),
        *value_cache.stride(),
        block_table.stride(0),
        ancestor_mask.stride(0) if ancestor_mask.dim() == 2 else 0,
        SLIDING_WINDOW=sliding_window,
        HAS_SOFT_CAP=soft_cap > 0,
        HAS_KV_SCALES=k_scale is not None,
        MASK_BY_REQUEST=ancestor_mask.dim() == 2,
        # The interpreter multiplies the bits of bfloat16 as integers.
        WIDEN=interpreted() and query.dtype == torch.bfloat16,
        **plan.constexprs(),
        num_warps=plan.num_warps,
        num_stages=plan.num_stages,
    )


_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def _tile_config(
    head_size: int,
    dtype: torch.dtype,
    kv_type: str,
    *,
    group: int = 4,
    packed_rows: int = 256,
    num_splits: int = 1,
    sliding_window: int = 0,
    soft_cap: bool = False,
) -> AotConfig:
    """As vLLM launches it: features adjacent, strides divisible by 16, masks by request."""
    tile = tile_for(head_size, dtype, packed_rows)
    kind = _TYPES[dtype]
    pointers = {"query": kind, "key": kv_type, "value": kv_type, "output": kind, "lse": "fp32",
                "partial": "fp32", "query_start_loc": "i32", "seq_lens": "i32",
                "block_table": "i32", "ancestor_mask": "i64", "k_scale": "fp32", "v_scale": "fp32"}  # fmt: skip
    strides = [f"{name}_{of}_stride" for name in ("query", "output") for of in ("token", "head")]
    strides += [
        f"{name}_{of}_stride" for name in ("key", "value") for of in ("block", "head", "token")
    ]
    signature = {f"{name}_ptr": f"*{of}:16" for name, of in pointers.items()}
    # Where an element is of one byte a block's stride may be beyond 32 bits.
    signature |= {name: "i64:16" if "block" in name else "i32:16" for name in strides}
    signature |= {"scale": "fp32", "soft_cap": "fp32", "max_rows": "i32", "num_tiles": "i32",
                  "num_heads": "i32", "block_table_stride": "i32", "mask_stride": "i32"}  # fmt: skip
    constexprs = {
        "GROUP": group, "HEAD_SIZE": head_size, "HEAD_PADDED": next_power_of_2(head_size),
        "BLOCK_SIZE": 16, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n,
        "NUM_SPLITS": num_splits, "MIN_SHARE": MIN_SHARE, "SLIDING_WINDOW": sliding_window,
        "HAS_SOFT_CAP": soft_cap, "HAS_KV_SCALES": kv_type != kind, "MASK_BY_REQUEST": True,
        "WIDEN": False, "key_feature_stride": 1, "value_feature_stride": 1,
    }  # fmt: skip
    extras = [f"splits{num_splits}"] if num_splits > 1 else []
    extras += ["window"] if sliding_window else []
    extras += ["cap"] if soft_cap else []
    name = "_".join([f"{kind}_kv{kv_type}_d{head_size}_m{tile.block_m}", *extras])
    kernel = tree_attention_kernel
    return AotConfig(kernel, name, signature, constexprs, tile.num_warps, tile.num_stages)


def _tile_configs() -> Iterator[AotConfig]:
    for head_size in HEAD_SIZES:
        for packed_rows in (16, 32) if head_size <= 128 else (16,):
            yield _tile_config(head_size, torch.bfloat16, "bf16", packed_rows=packed_rows)
    for head_size in (128, 256):
        yield _tile_config(head_size, torch.float16, "fp16")
        yield _tile_config(head_size, torch.float32, "fp32")
        yield _tile_config(head_size, torch.bfloat16, "u8")
        yield _tile_config(
            head_size, torch.bfloat16, "bf16", num_splits=8, sliding_window=4096, soft_cap=True
        )


AOT_CONFIGS = (
    *_tile_configs(),
    *(
        AotConfig(
            tree_attention_sum_kernel,
            f"bf16_d{head_size}_splits16",
            {
                "partial_ptr": "*fp32:16",
                "lse_ptr": "*fp32:16",
                "output_ptr": "*bf16:16",
                "query_start_loc_ptr": "*i32:16",
                "v_scale_ptr": "*fp32:16",
                "max_rows": "i32",
                "num_heads": "i32",
                "output_token_stride": "i32:16",
                "output_head_stride": "i32:16",
            },
            {
                "HEAD_SIZE": head_size,
                "HEAD_PADDED": next_power_of_2(head_size),
                "NUM_SPLITS": 16,
                "HAS_KV_SCALES": False,
            },
        )
        for head_size in (128, 256)
    ),
)
