# SPDX-License-Identifier: Apache-2.0
"""What the C++ linear layers ask of a weight (csrc/dot.hpp)."""

import torch

from .tree_attention_cpu import DTYPE_CODES

DEPTH_MULTIPLE = 32
COLUMN_MULTIPLE = 8


def misfit(
    name: str,
    # [num_columns, depth]
    weight: torch.Tensor,
    column_multiple: int = COLUMN_MULTIPLE,
) -> str | None:
    """Why a linear layer cannot read a weight, or None where it can."""
    if weight.dtype not in DTYPE_CODES or weight.dim() != 2 or not weight.is_contiguous():
        return f"the {name} weight is {weight.dtype}, allowed: contiguous {list(DTYPE_CODES)}"
    columns, depth = weight.shape
    if columns % column_multiple or depth % DEPTH_MULTIPLE:
        return (
            f"the {name} weight is {columns} x {depth}, "
            f"allowed: multiples of {column_multiple} and {DEPTH_MULTIPLE}"
        )
    return None
