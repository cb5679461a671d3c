# SPDX-License-Identifier: Apache-2.0
"""Row argmax: C++ against PyTorch, to the index."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heterospec_vllm.kernels.cpu.argmax_rows import argmax_rows_cpu
from heterospec_vllm.kernels.reference import cpu as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    columns=st.integers(1, 5000),
    rows=st.lists(st.integers(0, 8), max_size=20),
    levels=st.sampled_from([1, 2, 50, 10**6]),
    seed=st.integers(0, 2**31),
)
def test_equals_torch(dtype, columns, rows, levels, seed) -> None:
    """Few levels make ties, negative values and zeros of both signs likely."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-levels, 1, (9, columns + 3), generator=generator) / max(levels, 7)
    values = (values * -0.0 if levels == 1 else values).to(dtype)[:, :columns]
    index = torch.tensor(rows, dtype=torch.int64)
    assert torch.equal(argmax_rows_cpu(values, index), reference.argmax_rows(values, index))


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_and_nan(dtype) -> None:
    values = torch.zeros(5, 4097, dtype=dtype)
    values[0] = -math.inf
    values[1, 4096] = math.inf
    values[2, 7] = math.nan
    values[2, 9] = math.inf
    values[3] = -math.inf
    values[3, 4000] = -5.0
    values[4, 0] = -0.0  # equal to the zeros behind it: the first of equals wins
    index = torch.arange(5)
    assert argmax_rows_cpu(values, index).tolist() == [0, 4096, 7, 4000, 0]
    assert torch.equal(argmax_rows_cpu(values, index), reference.argmax_rows(values, index))


def test_rows_may_repeat_and_skip() -> None:
    values = torch.eye(6).to(torch.bfloat16)
    index = torch.tensor([5, 5, 0, 3])
    assert argmax_rows_cpu(values, index).tolist() == [5, 5, 0, 3]
