# SPDX-License-Identifier: Apache-2.0
"""A linear layer over any number of rows on CPU, its weight packed once (C++, csrc/packed_linear.hpp)."""

import struct

import torch

from .cpu_library import c_entry
from .tree_attention_cpu import DTYPE_CODES

_PACK = struct.Struct("=6q4Q").pack  # csrc/packed_linear.hpp: PackedLinearArguments
LANES = 16


def misfit(
    # [num_columns, depth]
    weight: torch.Tensor,
) -> str | None:
    """Why a weight cannot be packed, or None where it can."""
    if weight.dtype not in DTYPE_CODES or weight.dim() != 2:
        return f"the weight is {weight.dtype} of {weight.dim()} dimensions, allowed: 2 and {list(DTYPE_CODES)}"
    columns, depth = weight.shape
    if columns % LANES or depth % LANES or not weight.numel():
        return f"the weight is {columns} x {depth}, allowed: multiples of {LANES}"
    return None


def pack_weight(
    # [num_columns, depth]
    weight: torch.Tensor,
) -> torch.Tensor:
    """A copy in panels of 16 columns: [panels, depth / 2, 16, 2] in bfloat16, [panels, depth, 16] otherwise."""
    reason = misfit(weight)
    assert reason is None, reason
    columns, depth = weight.shape
    pair = 2 if weight.dtype == torch.bfloat16 else 1
    panels = weight.view(columns // LANES, LANES, depth // pair, pair).transpose(1, 2)
    return panels.contiguous() if pair == 2 else panels.squeeze(-1).contiguous()


def packed_linear_cpu(
    # [num_rows, depth], columns adjacent
    rows: torch.Tensor,
    # as `pack_weight` leaves it
    packed: torch.Tensor,
    # [num_columns]
    bias: torch.Tensor | None = None,
    pairs: bool | None = None,
) -> torch.Tensor:
    """[num_rows, num_columns]: `torch.nn.functional.linear(rows, weight, bias)`, summed in float.

    A row's result does not depend on the other rows, to the bit.

    Args:
        pairs: for bfloat16, whether to take the instruction that multiplies pairs, where there is one; None for
            whichever is the faster here (csrc/product_speed.hpp).

    Raises:
        LibraryUnavailable: the kernel cannot be built.
    """
    num_rows, depth = rows.shape
    num_columns = packed.shape[0] * LANES
    assert rows.dtype == packed.dtype and rows.stride(1) == 1
    assert packed.numel() == num_columns * depth
    assert bias is None or (bias.dtype == rows.dtype and bias.is_contiguous())
    out = torch.empty((num_rows, num_columns), dtype=rows.dtype)
    failed = c_entry("heterospec_packed_linear")(
        _PACK(
            DTYPE_CODES[rows.dtype],
            num_rows,
            depth,
            num_columns,
            rows.stride(0),
            2 if pairs is None else int(pairs),
            rows.data_ptr(),
            packed.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            out.data_ptr(),
        )
    )
    assert not failed
    return out
