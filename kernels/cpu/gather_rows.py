# SPDX-License-Identifier: Apache-2.0
"""Some rows of several matrices side by side on CPU, in one call (C++, csrc/)."""

import torch

from .library import c_entry
from .structs import STRUCTS

_PACK = STRUCTS["GatherArguments"].pack
_PACK_SOURCE = STRUCTS["RowSource"].pack


def gather_rows_cpu(
    # each [num_source_rows, columns], columns adjacent, all of one dtype
    sources: list[torch.Tensor],
    # [num_rows], int64, each >= 0 and a row of every source
    rows: torch.Tensor,
) -> torch.Tensor:
    """[num_rows, columns of all sources]: `torch.cat([source[rows] for source in sources], dim=1)`.

    One small call where torch makes one a source and another: after a model's pass each of those finds its code and
    its data outside the caches and takes 40 microseconds.

    Raises:
        LibraryUnavailable: the kernel cannot be built.
    """
    assert rows.dtype == torch.int64 and rows.is_contiguous()
    dtype, size = sources[0].dtype, sources[0].element_size()
    width, records = 0, b""
    for source in sources:
        (_, columns), (row_stride, column_stride) = source.shape, source.stride()
        assert source.dtype == dtype and column_stride == 1, (source.dtype, source.stride())
        records += _PACK_SOURCE(source.data_ptr(), row_stride * size, columns * size)
        width += columns
    out = torch.empty((rows.shape[0], width), dtype=dtype)
    arguments = _PACK(len(sources), rows.shape[0], rows.data_ptr(), out.data_ptr())
    failed = c_entry("heterospec_gather_rows")(arguments + records)
    assert not failed
    return out
