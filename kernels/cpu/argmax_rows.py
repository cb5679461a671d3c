# SPDX-License-Identifier: Apache-2.0
"""Argmax of some rows of a matrix on CPU, read in their own dtype (C++, csrc/)."""

import torch

from .library import c_entry
from .structs import STRUCTS

_PACK = STRUCTS["ArgmaxArguments"].pack
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def argmax_rows_cpu(
    # [num_values_rows, num_columns], columns adjacent; float32, bfloat16 or float16
    values: torch.Tensor,
    # [num_rows], int64
    rows: torch.Tensor,
) -> torch.Tensor:
    """The column of the largest value of each named row, the first of equals: [num_rows], int64.

    Equals `values[rows].float().argmax(dim=-1)` (a NaN is the largest), without the copies.

    Raises:
        LibraryUnavailable: the kernel cannot be built.
    """
    assert values.dtype in _DTYPES and values.stride(1) == 1, (values.dtype, values.stride())
    assert rows.dtype == torch.int64 and rows.is_contiguous()
    indices = torch.empty_like(rows)
    failed = c_entry("heterospec_argmax_rows")(
        _PACK(
            values.element_size(),
            rows.shape[0],
            values.shape[1],
            values.stride(0),
            values.data_ptr(),
            rows.data_ptr(),
            indices.data_ptr(),
        )
    )
    assert not failed
    return indices
