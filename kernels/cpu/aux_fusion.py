# SPDX-License-Identifier: Apache-2.0
"""A target's aux hidden states made into the draft head's input, in one call on CPU (C++, csrc/)."""

import torch

from .library import DTYPE_CODES, c_entry
from .packed_linear import LANES, size_of
from .structs import STRUCTS

_PACK = STRUCTS["AuxFusionArguments"].pack


def misfit(norms: torch.Tensor | None, packed: torch.Tensor) -> str | None:
    """Why the kernel cannot compute this fusion, or None where it can."""
    _, depth = size_of(packed)
    if norms is not None and (
        norms.dtype != packed.dtype or norms.numel() != depth or norms.shape[1] % LANES
    ):
        return f"the aux norms are {norms.dtype} {tuple(norms.shape)} for {depth} inputs"
    return None


def aux_fusion_cpu(
    # [num_rows, num_aux * aux_size], contiguous
    features: torch.Tensor,
    # [num_aux, aux_size], contiguous; None: taps are taken as they are
    norms: torch.Tensor | None,
    # [num_columns, num_aux * aux_size], packed
    packed: torch.Tensor,
    epsilon: float,
) -> torch.Tensor:
    """[num_rows, num_columns]: each tap through its RMSNorm, all of them through one linear layer.

    Raises:
        LibraryUnavailable: the kernel cannot be built.
    """
    num_columns, depth = size_of(packed)
    num_aux, aux_size = (1, depth) if norms is None else norms.shape
    assert features.is_contiguous() and packed.is_contiguous() and features.dtype == packed.dtype
    assert features.shape[1] == num_aux * aux_size == depth
    fused = torch.empty((features.shape[0], num_columns), dtype=packed.dtype)
    failed = c_entry("heterospec_fuse_aux")(
        _PACK(
            DTYPE_CODES[packed.dtype],
            features.shape[0],
            num_aux,
            aux_size,
            num_columns,
            epsilon,
            features.data_ptr(),
            0 if norms is None else norms.data_ptr(),
            packed.data_ptr(),
            fused.data_ptr(),
        )
    )
    assert not failed
    return fused
