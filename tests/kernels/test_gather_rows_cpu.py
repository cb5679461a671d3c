# SPDX-License-Identifier: Apache-2.0
"""Gathered rows: C++ against the reference, to the bit."""

import pytest
import torch

from heterospec_vllm.kernels.cpu.gather_rows import gather_rows_cpu
from heterospec_vllm.kernels.reference import cpu as reference

pytestmark = pytest.mark.usefixtures("cpu_build")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def matrices(dtype: torch.dtype, num_rows: int, columns: list[int]) -> list[torch.Tensor]:
    torch.manual_seed(num_rows)
    return [torch.randn(num_rows, count).to(dtype) for count in columns]


@pytest.mark.usefixtures("poisoned_scratch")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [[1], [576], [576, 576, 576], [3, 64, 5]])
@pytest.mark.parametrize("count", [0, 1, 7, 300])
def test_equals_the_reference(dtype, columns, count) -> None:
    sources = matrices(dtype, 41, columns)
    rows = torch.randint(0, 41, (count,))
    got = gather_rows_cpu(sources, rows)
    assert got.dtype == dtype and torch.equal(got, reference.gather_rows(sources, rows))


@pytest.mark.parametrize("dtype", DTYPES)
def test_columns_of_wider_matrices(dtype) -> None:
    wide, other = matrices(dtype, 9, [200, 16])
    sources = [wide[:, 40:104], other, wide[2:, :8]]
    rows = torch.tensor([6, 0, 6])
    assert torch.equal(gather_rows_cpu(sources, rows), reference.gather_rows(sources, rows))


def test_bits_stay_as_they_are() -> None:
    """NaN with its payload, infinities and the sign of zero."""
    bits = torch.tensor([[0x7FC0BEEF, 0x7F800000], [-(2**31), -(2**23)]], dtype=torch.int32)
    source = bits.view(torch.float32)
    got = gather_rows_cpu([source], torch.tensor([1, 0, 1]))
    assert torch.equal(got.view(torch.int32), bits[[1, 0, 1]])


def test_what_it_cannot_read_is_refused() -> None:
    one, rows = torch.zeros(4, 8), torch.zeros(1, dtype=torch.int64)
    for sources, wanted in (
        ([one.T], rows),
        ([one, one.half()], rows),
        ([one], rows.int()),
    ):
        with pytest.raises(AssertionError):
            gather_rows_cpu(sources, wanted)
