# SPDX-License-Identifier: Apache-2.0
"""What the host decides about a tree attention launch: tiles, splits, workspace, and what it refuses."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from ..head_sizes import GPU as HEAD_SIZES

MAX_ROWS = 64  # rows a request: the width of the ancestor mask
BLOCK_SIZE_MULTIPLE = 16
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FP8 = torch.float8_e4m3fn

MAX_SPLITS = 16
MIN_SHARE = 256  # tokens of context that are worth a program of their own
PROGRAMS_PER_PROCESSOR = 2


def interpreted() -> bool:
    """Whether kernels run under the Triton interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def decodes_fp8(device: torch.device) -> bool:
    """Whether Triton can load e4m3fn there; elsewhere its bits are decoded (CUDA before sm_89, ROCm)."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 9)


def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors or compute units; a few for a CPU under the interpreter."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def unsupported_reason(
    head_size: int,
    block_size: int,
    query_dtype: torch.dtype,
    kv_dtype: torch.dtype,
    num_heads: int,
    num_kv_heads: int,
) -> str | None:
    """Why tree attention cannot run for a model, or None if it can; for start-up, so no step has to fail."""
    if head_size not in HEAD_SIZES:
        return f"head size {head_size}, allowed: {HEAD_SIZES}"
    if block_size <= 0 or block_size % BLOCK_SIZE_MULTIPLE:
        return f"KV block size {block_size}, allowed: multiples of {BLOCK_SIZE_MULTIPLE}"
    if query_dtype not in DTYPES:
        return f"query dtype {query_dtype}, allowed: {', '.join(map(str, DTYPES))}"
    if kv_dtype not in (query_dtype, FP8):
        return f"KV cache dtype {kv_dtype}, allowed: {query_dtype} or {FP8}"
    if num_kv_heads <= 0 or num_heads % num_kv_heads:
        return f"{num_heads} query heads, allowed: multiples of {num_kv_heads} KV heads"
    return None


@dataclass(frozen=True)
class TreeAttentionPlan:
    """Everything about a launch that follows from capacities; fixed for the life of a captured graph.

    Make it with :meth:`of`. Sizes of tiles are in packed rows (BLOCK_M) and slots (BLOCK_N).
    """

    max_rows: int  # most rows of a request that is attended to
    num_heads: int
    num_kv_heads: int
    head_size: int
    block_size: int  # slots of a KV block
    num_splits: int  # programs that share a request's context, a power of two
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    native_fp8: bool

    @classmethod
    def of(
        cls,
        *,
        num_reqs: int,
        max_rows: int,
        max_seq_len: int,
        num_heads: int,
        num_kv_heads: int,
        head_size: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        num_splits: int | None = None,
    ) -> TreeAttentionPlan:
        """Chooses tiles and splits from the batch's capacities.

        Args:
            num_reqs: requests of the batch, or of the captured graph.
            max_rows: most rows of a request, 1..64.
            max_seq_len: most slots of a request, this step's rows included.
            dtype: of the query.
            num_splits: None: so many that the device's processors have work.

        Raises:
            ValueError: names the argument, what was found and what is allowed.
        """
        reason = unsupported_reason(head_size, block_size, dtype, dtype, num_heads, num_kv_heads)
        require(reason is None, "plan", reason, "what unsupported_reason accepts")
        require(1 <= max_rows <= MAX_ROWS, "max_rows", max_rows, f"1..{MAX_ROWS}")
        if num_splits is None:
            wanted = PROGRAMS_PER_PROCESSOR * num_processors(device)
            num_splits = splits_for(num_reqs * num_kv_heads, max_seq_len, wanted)
        powers = [2**i for i in range(MAX_SPLITS.bit_length())]
        require(num_splits in powers, "num_splits", num_splits, powers)
        tile = tile_for(head_size, dtype, max_rows * num_heads // num_kv_heads)
        return cls(
            max_rows=max_rows,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_size=head_size,
            block_size=block_size,
            num_splits=num_splits,
            block_m=tile.block_m,
            block_n=tile.block_n,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            native_fp8=decodes_fp8(device),
        )

    @property
    def head_padded(self) -> int:
        return next_power_of_2(self.head_size)

    @property
    def num_tiles(self) -> int:
        """Tiles that the packed rows of the largest request take."""
        return -(-self.max_rows * self.num_heads // self.num_kv_heads // self.block_m)

    def constexprs(self) -> dict[str, int]:
        """The kernel's constants that the plan fixes."""
        return {
            "GROUP": self.num_heads // self.num_kv_heads,
            "HEAD_SIZE": self.head_size,
            "HEAD_PADDED": self.head_padded,
            "BLOCK_SIZE": self.block_size,
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "NUM_SPLITS": self.num_splits,
            "MIN_SHARE": MIN_SHARE,
        }

    def stored(self, cache: torch.Tensor) -> torch.Tensor:
        """The cache as the kernel loads it: fp8 as its bits where the hardware cannot convert it."""
        if cache.dtype == FP8 and not self.native_fp8:
            return cache.view(torch.uint8)
        return cache

    def workspace(self, num_tokens: int, device: torch.device) -> TreeAttentionWorkspace | None:
        """Memory for the shares of up to `num_tokens` rows; None if the context is not split."""
        if self.num_splits == 1:
            return None
        shape = (num_tokens, self.num_heads, self.num_splits)
        return TreeAttentionWorkspace(
            partial=torch.empty((*shape, self.head_padded), dtype=torch.float32, device=device),
            lse=torch.empty(shape, dtype=torch.float32, device=device),
        )


@dataclass(frozen=True)
class TreeAttentionWorkspace:
    """What the shares of a split context leave for the launch that adds them up; filled by the kernel."""

    # [num_tokens, num_heads, num_splits, head_padded], float32
    partial: torch.Tensor
    # [num_tokens, num_heads, num_splits], float32, log2 of the summed weights
    lse: torch.Tensor


@dataclass(frozen=True)
class Tile:
    """Shape of a program's work and how it is compiled."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def tile_for(head_size: int, dtype: torch.dtype, packed_rows: int) -> Tile:
    """The tile for a head size and the packed rows of the largest tree (rows times query heads a KV head).

    The largest that compile without spills for sm_80, sm_90, sm_100 and gfx942, bits of fp8 included.
    """
    wide = head_size > 128
    if dtype == torch.float32:
        # Exact products take no tensor core: operands are spread over the threads' registers.
        return Tile(block_m=16, block_n=16, num_warps=4, num_stages=2)
    block_m = min(max(next_power_of_2(packed_rows), 16), 16 if wide else 32)
    return Tile(block_m, 32 if wide else 64, num_warps=4, num_stages=2)


def splits_for(num_tiles: int, max_seq_len: int, wanted_programs: int) -> int:
    """Largest power of two that neither asks for more programs than wanted nor for shares below MIN_SHARE."""
    most = min(wanted_programs // max(num_tiles, 1), -(-max_seq_len // MIN_SHARE), MAX_SPLITS)
    return 1 << max(most, 1).bit_length() - 1


def next_power_of_2(value: int) -> int:
    return 1 << max(value - 1, 0).bit_length()


def require(holds: bool, name: str, found: object, allowed: object) -> None:
    if not holds:
        raise ValueError(f"tree_attention: {name} is {found}, allowed: {allowed}")


def check_arguments(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    output: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    ancestor_mask: torch.Tensor,
    plan: TreeAttentionPlan,
    workspace: TreeAttentionWorkspace | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    sliding_window: int,
    soft_cap: float,
) -> None:
    """Shapes, dtypes, devices, strides and capacities; nothing that would read the device.

    Raises:
        ValueError: names the argument, what was found and what is allowed.
    """
    _check_rows(query, output, plan)
    for name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        _check_cache(name, cache, query, plan)
    require(
        value_cache.dtype == key_cache.dtype,
        "value_cache.dtype",
        value_cache.dtype,
        key_cache.dtype,
    )
    _check_scales(key_cache, k_scale, v_scale)
    num_reqs = seq_lens.shape[0]
    _check_ints("seq_lens", seq_lens, query, (num_reqs,))
    _check_ints("query_start_loc", query_start_loc, query, (num_reqs + 1,))
    require(block_table.dtype == torch.int32, "block_table.dtype", block_table.dtype, torch.int32)
    require(
        block_table.dim() == 2 and block_table.shape[0] >= num_reqs and block_table.stride(1) == 1,
        "block_table",
        f"{tuple(block_table.shape)} with strides {block_table.stride()}",
        f"at least {num_reqs} rows, columns adjacent",
    )
    _check_mask(ancestor_mask, query.shape[0], num_reqs, plan)
    for name, tensor in (("block_table", block_table), ("ancestor_mask", ancestor_mask)):
        require(tensor.device == query.device, f"{name}.device", tensor.device, query.device)
    require(sliding_window >= 0, "sliding_window", sliding_window, ">= 0")
    require(soft_cap >= 0, "soft_cap", soft_cap, ">= 0")
    _check_workspace(workspace, query, plan)


def _check_rows(query: torch.Tensor, output: torch.Tensor, plan: TreeAttentionPlan) -> None:
    heads = (plan.num_heads, plan.head_size)
    require(
        query.dim() == 3 and tuple(query.shape[1:]) == heads,
        "query.shape",
        tuple(query.shape),
        f"(num_tokens, {plan.num_heads}, {plan.head_size})",
    )
    require(query.dtype in DTYPES, "query.dtype", query.dtype, ", ".join(map(str, DTYPES)))
    place = "cpu (interpreter)" if interpreted() else "cuda"
    found = query.device.type
    require(
        found == "cuda" or interpreted() and found == "cpu", "query.device", query.device, place
    )
    require(output.shape == query.shape, "output.shape", tuple(output.shape), tuple(query.shape))
    require(output.dtype == query.dtype, "output.dtype", output.dtype, query.dtype)
    require(output.device == query.device, "output.device", output.device, query.device)
    for name, tensor in (("query", query), ("output", output)):
        require(tensor.stride(2) == 1, f"{name}.stride(2)", tensor.stride(2), 1)


def _check_cache(
    name: str, cache: torch.Tensor, query: torch.Tensor, plan: TreeAttentionPlan
) -> None:
    shape = (plan.num_kv_heads, plan.block_size, plan.head_size)
    require(
        cache.dim() == 4 and tuple(cache.shape[1:]) == shape,
        f"{name}.shape",
        tuple(cache.shape),
        f"(num_blocks, {', '.join(map(str, shape))})",
    )
    require(
        cache.dtype in (query.dtype, FP8), f"{name}.dtype", cache.dtype, f"{query.dtype} or {FP8}"
    )
    require(cache.device == query.device, f"{name}.device", cache.device, query.device)


def _check_scales(
    key_cache: torch.Tensor, k_scale: torch.Tensor | None, v_scale: torch.Tensor | None
) -> None:
    needed = key_cache.dtype == FP8
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if scale is None:
            require(not needed, name, None, "a tensor with an fp8 cache")
            continue
        require(needed, name, "given", f"None with a {key_cache.dtype} cache")
        require(scale.numel() == 1, f"{name}.shape", tuple(scale.shape), "one element")
        require(scale.dtype == torch.float32, f"{name}.dtype", scale.dtype, torch.float32)
        require(scale.device == key_cache.device, f"{name}.device", scale.device, key_cache.device)


def _check_ints(
    name: str, tensor: torch.Tensor, query: torch.Tensor, shape: tuple[int, ...]
) -> None:
    require(tensor.dtype == torch.int32, f"{name}.dtype", tensor.dtype, torch.int32)
    require(tuple(tensor.shape) == shape, f"{name}.shape", tuple(tensor.shape), shape)
    require(tensor.is_contiguous(), f"{name}.stride()", tensor.stride(), "contiguous")
    require(tensor.device == query.device, f"{name}.device", tensor.device, query.device)


def _check_mask(
    ancestor_mask: torch.Tensor, num_tokens: int, num_reqs: int, plan: TreeAttentionPlan
) -> None:
    require(
        ancestor_mask.dtype == torch.int64, "ancestor_mask.dtype", ancestor_mask.dtype, torch.int64
    )
    shape = tuple(ancestor_mask.shape)
    flat = len(shape) == 1 and shape[0] >= num_tokens
    by_request = len(shape) == 2 and shape[0] >= num_reqs and shape[1] >= plan.max_rows
    allowed = f"at least ({num_tokens},) or ({num_reqs}, {plan.max_rows})"
    require(flat or by_request, "ancestor_mask.shape", shape, allowed)
    require(ancestor_mask.stride(-1) == 1, "ancestor_mask.stride(-1)", ancestor_mask.stride(-1), 1)


def _check_workspace(
    workspace: TreeAttentionWorkspace | None, query: torch.Tensor, plan: TreeAttentionPlan
) -> None:
    if plan.num_splits == 1:
        return
    require(workspace is not None, "workspace", None, "that of plan.workspace()")
    assert workspace is not None
    shape = (plan.num_heads, plan.num_splits, plan.head_padded)
    found = tuple(workspace.partial.shape)
    require(
        found[0] >= query.shape[0] and found[1:] == shape,
        "workspace.partial.shape",
        found,
        f"at least ({query.shape[0]}, {', '.join(map(str, shape))})",
    )
    where = workspace.partial.device
    require(where == query.device, "workspace.partial.device", where, query.device)
