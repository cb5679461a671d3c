# SPDX-License-Identifier: Apache-2.0
"""Taps on their way into the head: C++ against the float64 reference."""

import math

import pytest
import torch

from heterospec_vllm.kernels.cpu.aux_fusion import aux_fusion_cpu, misfit
from heterospec_vllm.kernels.cpu.packed_linear import pack_weight
from heterospec_vllm.kernels.reference import cpu as reference

pytestmark = pytest.mark.usefixtures("cpu_build")

# float32 sums in another order; the others round a tap once before its products.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 5, 17, 64])
@pytest.mark.parametrize(("taps", "size", "columns"), [(1, 32, 16), (3, 96, 48), (4, 576, 576)])
def test_equals_the_reference(dtype, num_rows, taps, size, columns) -> None:
    torch.manual_seed(num_rows)
    scales = torch.logspace(-2, 2, num_rows)[:, None]
    features = (torch.randn(num_rows, taps * size) * scales).to(dtype)
    norms = (1 + 0.3 * torch.randn(taps, size)).to(dtype)
    weight = (torch.randn(columns, taps * size) / math.sqrt(taps * size)).to(dtype)
    for given in (norms, None):
        got = aux_fusion_cpu(features, given, pack_weight(weight), 1e-5)
        expected = reference.aux_fusion(features, given, weight, 1e-5)
        room = TOLERANCES[dtype] * (1.0 if given is not None else scales)
        assert ((got - expected).abs() <= room + TOLERANCES[dtype] * expected.abs()).all()


def test_a_row_of_nan_stays_alone() -> None:
    features = torch.randn(3, 64)
    features[1, 40] = math.nan
    fused = aux_fusion_cpu(features, torch.ones(2, 32), pack_weight(torch.randn(16, 64)), 1e-5)
    assert fused[1].isnan().all() and fused[[0, 2]].isfinite().all()


def test_norms_that_do_not_fit_are_named() -> None:
    packed = pack_weight(torch.zeros(16, 64, dtype=torch.bfloat16))
    assert misfit(None, packed) is None
    assert misfit(torch.ones(2, 32, dtype=torch.bfloat16), packed) is None
    assert "torch.float32" in str(misfit(torch.ones(2, 32), packed))
    assert "(3, 32)" in str(misfit(torch.ones(3, 32, dtype=torch.bfloat16), packed))
