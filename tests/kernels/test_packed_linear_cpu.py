# SPDX-License-Identifier: Apache-2.0
"""Linear layers over packed weights: C++ against the float64 reference."""

import math

import pytest
import torch

from heterospec_vllm.kernels.cpu.packed_linear import (
    misfit,
    pack_weight,
    packed_linear_cpu,
    size_of,
    unpack_weight,
)
from heterospec_vllm.kernels.reference import cpu as reference

pytestmark = pytest.mark.usefixtures("cpu_build")

# Relative to the largest term: float32 sums in another order; the others round the sum once, bfloat16 to 8 bits and
# float16 to 11.
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def layer(num_rows: int, columns: int, depth: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(num_rows + columns + depth)
    rows, weight = torch.randn(num_rows, depth), torch.randn(columns, depth) / math.sqrt(depth)
    return rows.to(dtype), weight.to(dtype), torch.randn(columns).to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("num_rows", [0, 1, 2, 5, 12, 13, 24, 31, 100, 257])
@pytest.mark.parametrize(
    ("columns", "depth"),
    # One panel, an odd number of panels, several blocks of depth with a rest, many panels.
    [(16, 16), (48, 32), (80, 4112), (960, 576)],
)
def test_equals_the_reference(dtype, num_rows, columns, depth) -> None:
    rows, weight, bias = layer(num_rows, columns, depth, dtype)
    for given in (None, bias):
        got = packed_linear_cpu(rows, pack_weight(weight), given)
        expected = reference.packed_linear(rows, weight, given)
        terms = (rows.double().norm(dim=1)[:, None] * weight.double().norm(dim=1)).clamp(min=1)
        assert got.shape == expected.shape and got.dtype == dtype
        assert ((got - expected).abs() <= TOLERANCES[dtype] * (terms + expected.abs())).all()


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_a_row_does_not_depend_on_the_others(dtype) -> None:
    """To the bit: what a tree's row gives is what the same token gives alone."""
    rows, weight, bias = layer(203, 96, 2064, dtype)
    packed = pack_weight(weight)
    whole = packed_linear_cpu(rows, packed, bias)
    for size in (1, 2, 7, 12, 13, 50):
        for begin in (0, 61):
            part = packed_linear_cpu(rows[begin : begin + size], packed, bias)
            assert torch.equal(part, whole[begin : begin + size])


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_columns_of_a_wider_matrix_and_what_lies_beside_them(dtype) -> None:
    rows, weight, _ = layer(9, 32, 64, dtype)
    wide = torch.full((9, 200), math.nan, dtype=dtype)
    wide[:, 40:104] = rows
    packed = pack_weight(weight)
    got = packed_linear_cpu(wide[:, 40:104], packed)
    assert torch.equal(got, packed_linear_cpu(rows, packed))


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_nan_and_infinity_stay_in_their_rows(dtype) -> None:
    rows, weight, _ = layer(14, 48, 32, dtype)
    rows[3, 5], rows[13, 31] = math.nan, math.inf
    out = packed_linear_cpu(rows, pack_weight(weight))
    assert out[3].isnan().all() and not out[13].isfinite().any()
    assert out[[r for r in range(14) if r not in (3, 13)]].isfinite().all()


@pytest.mark.usefixtures("poisoned_scratch")
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_every_value_is_written(dtype) -> None:
    rows, weight, bias = layer(25, 144, 48, dtype)
    assert packed_linear_cpu(rows, pack_weight(weight), bias).isfinite().all()


def test_packing_is_a_rearrangement() -> None:
    weight = torch.arange(32 * 16).view(32, 16)
    floats = pack_weight(weight.float())
    assert floats.shape == (2, 16, 16) and floats[1, 3, 2] == weight[18, 3]
    pairs = pack_weight(weight.bfloat16())
    for packed in (floats, pairs):
        assert size_of(packed) == (32, 16)
        assert torch.equal(unpack_weight(packed), weight.to(packed.dtype))
    assert pairs.shape == (2, 8, 16, 2) and pairs[1, 3, 2, 1] == weight[18, 7].bfloat16()


def test_weights_that_do_not_fit_are_named() -> None:
    assert misfit(torch.zeros(32, 16)) is None
    assert "24 x 16" in str(misfit(torch.zeros(24, 16)))
    assert "16 x 8" in str(misfit(torch.zeros(16, 8)))
    assert "0 x 16" in str(misfit(torch.zeros(0, 16)))
    assert "float64" in str(misfit(torch.zeros(16, 16).double()))
    assert "3 dimensions" in str(misfit(torch.zeros(2, 16, 16)))
