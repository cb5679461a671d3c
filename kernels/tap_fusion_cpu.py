# SPDX-License-Identifier: Apache-2.0
"""A target's tap states made into the draft head's input, in one call on CPU (C++, csrc/)."""

import struct

import torch

from . import linear_cpu
from .cpu_library import c_entry
from .tree_attention_cpu import DTYPE_CODES

_PACK = struct.Struct("=5qd4Q").pack  # csrc/tap_fusion.hpp: TapArguments
_COLUMN_MULTIPLE = 16  # lanes of a vector


def misfit(norms: torch.Tensor | None, weight: torch.Tensor) -> str | None:
    """Why the kernel cannot compute this fusion, or None where it can."""
    reason = linear_cpu.misfit("tap", weight, _COLUMN_MULTIPLE)
    if reason is not None:
        return reason
    if norms is not None and (
        norms.dtype != weight.dtype
        or norms.numel() != weight.shape[1]
        or norms.shape[1] % _COLUMN_MULTIPLE
    ):
        return f"the tap norms are {norms.dtype} {tuple(norms.shape)} for {weight.shape[1]} inputs"
    return None


def tap_fusion_cpu(
    # [num_rows, num_taps * tap_size], contiguous
    features: torch.Tensor,
    # [num_taps, tap_size], contiguous; None: taps are taken as they are
    norms: torch.Tensor | None,
    # [num_columns, num_taps * tap_size], contiguous
    weight: torch.Tensor,
    epsilon: float,
) -> torch.Tensor:
    """[num_rows, num_columns]: each tap through its RMSNorm, all of them through one linear layer.

    Raises:
        LibraryUnavailable: the kernel cannot be built.
    """
    num_taps, tap_size = (1, weight.shape[1]) if norms is None else norms.shape
    assert features.is_contiguous() and features.dtype == weight.dtype
    assert features.shape[1] == num_taps * tap_size == weight.shape[1]
    fused = torch.empty((features.shape[0], weight.shape[0]), dtype=weight.dtype)
    failed = c_entry("heterospec_fuse_taps")(
        _PACK(
            DTYPE_CODES[weight.dtype],
            features.shape[0],
            num_taps,
            tap_size,
            weight.shape[0],
            epsilon,
            features.data_ptr(),
            0 if norms is None else norms.data_ptr(),
            weight.data_ptr(),
            fused.data_ptr(),
        )
    )
    assert not failed
    return fused
