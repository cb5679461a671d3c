# SPDX-License-Identifier: Apache-2.0
"""A linear layer over any number of rows on CPU, its weight packed once (C++, csrc/packed_linear.hpp)."""

import torch

from .library import DTYPE_CODES, c_entry
from .structs import STRUCTS

_PACK = STRUCTS["PackedLinearArguments"].pack
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


def unpack_weight(
    # as `pack_weight` leaves it
    packed: torch.Tensor,
) -> torch.Tensor:
    """[num_columns, depth]: what was packed."""
    panels = packed if packed.dim() == 4 else packed.unsqueeze(-1)
    return panels.transpose(1, 2).reshape(size_of(packed))


def size_of(
    # as `pack_weight` leaves it
    packed: torch.Tensor,
) -> tuple[int, int]:
    """(num_columns, depth) of what was packed."""
    return packed.shape[0] * LANES, packed[0].numel() // LANES


def packed_linear_cpu(
    # [num_rows, depth], columns adjacent
    rows: torch.Tensor,
    # as `pack_weight` leaves it
    packed: torch.Tensor,
    # [num_columns]
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """[num_rows, num_columns]: `torch.nn.functional.linear(rows, weight, bias)`, summed in float.

    A row's result does not depend on the other rows, to the bit.

    Raises:
        LibraryUnavailable: the kernel cannot be built.
    """
    num_rows, depth = rows.shape
    num_columns = packed.shape[0] * LANES
    assert rows.dtype == packed.dtype and rows.stride(1) == 1
    assert packed.numel() == num_columns * depth and packed.is_contiguous()
    assert bias is None or (bias.dtype == rows.dtype and bias.is_contiguous())
    out = torch.empty((num_rows, num_columns), dtype=rows.dtype)
    failed = c_entry("heterospec_packed_linear")(
        _PACK(
            DTYPE_CODES[rows.dtype],
            num_rows,
            depth,
            num_columns,
            rows.stride(0),
            rows.data_ptr(),
            packed.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            out.data_ptr(),
        )
    )
    assert not failed
    return out
