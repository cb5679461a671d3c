# SPDX-License-Identifier: Apache-2.0
"""A draft head's likeliest tokens: C++ against PyTorch."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heterospec_vllm.kernels.cpu.packed_linear import pack_weight
from heterospec_vllm.kernels.cpu.top_tokens import top_tokens_cpu
from heterospec_vllm.kernels.reference import cpu as reference

pytestmark = pytest.mark.usefixtures("cpu_build")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Products are exact and sums are float32; a logarithm of about ten has this many correct digits.
TOLERANCE = 1e-4


def top_tokens(rows, weight, offsets, top_k) -> tuple[torch.Tensor, torch.Tensor]:
    """With a weight as checkpoints hold it; columns that fill the last panel would win."""
    columns = weight.shape[0]
    filled = torch.nn.functional.pad(weight, (0, 0, 0, -columns % 16), value=9.0)
    return top_tokens_cpu(rows, pack_weight(filled), columns, offsets, top_k)


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    num_rows=st.integers(1, 70),
    depth=st.sampled_from([16, 32, 64, 96]),
    columns=st.integers(8, 560),
    top_k=st.integers(1, 8),
    seed=st.integers(0, 2**31),
)
def test_equals_torch(dtype, num_rows, depth, columns, top_k, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(num_rows, depth, generator=generator).to(dtype)
    weight = torch.randn(columns, depth, generator=generator).to(dtype)
    tokens, log_probs = top_tokens(rows, weight, None, top_k)
    expected_tokens, expected = reference.top_tokens(rows, weight, None, top_k)
    torch.testing.assert_close(log_probs, expected, rtol=TOLERANCE, atol=TOLERANCE)
    parted = tokens != expected_tokens  # only where rounding could have swapped two neighbours
    exact = (rows.double() @ weight.double().T).log_softmax(dim=-1).float()
    assert torch.allclose(
        exact.gather(1, tokens)[parted], expected[parted], rtol=TOLERANCE, atol=TOLERANCE
    )
    assert all(len(set(row)) == top_k for row in tokens.tolist())


@pytest.mark.parametrize("num_rows", [3, 20])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_come_in_the_order_of_columns(dtype, num_rows) -> None:
    rows = torch.ones(num_rows, 32, dtype=dtype)
    weight = torch.zeros(8192, 32, dtype=dtype)
    weight[[8191, 100, 4096]] = 1.0
    tokens, log_probs = top_tokens(rows, weight, None, 5)
    assert tokens.tolist() == [[100, 4096, 8191, 0, 1]] * num_rows
    total = math.log(3 * math.exp(32) + 8189)
    assert log_probs[0].tolist() == pytest.approx([32 - total] * 3 + [-total] * 2, abs=1e-4)


def test_offsets_turn_columns_into_tokens() -> None:
    rows = torch.eye(32)[:2].contiguous()
    weight = torch.eye(32)
    offsets = torch.arange(32) * 3
    tokens, _ = top_tokens(rows, weight, offsets, 1)
    assert tokens.tolist() == [[0], [4]]


def test_infinities_and_nan() -> None:
    weight = torch.zeros(16, 32)
    weight[:15, 0] = -math.inf  # of the first row all columns but one are impossible
    weight[3, 1] = math.nan
    weight[4, 2] = math.inf
    rows = torch.eye(32)[:4].contiguous()
    rows[0, 1:] = 0
    tokens, log_probs = top_tokens(rows, weight, None, 4)
    # 0 * inf is NaN: every row but a clean one meets it.
    assert log_probs[1:].isnan().all()
    assert ((tokens >= 0) & (tokens < 16)).all()
    clean = torch.full((8, 32), -math.inf)
    clean[5] = 0.5
    tokens, log_probs = top_tokens(torch.ones(1, 32), clean, None, 3)
    assert tokens[0, 0] == 5 and log_probs[0].tolist() == [0.0, -math.inf, -math.inf]


@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    num_rows=st.integers(1, 20),
    columns=st.integers(8, 200),
    share=st.sampled_from([0.02, 0.3, 0.9]),
    seed=st.integers(0, 2**31),
)
def test_masked_tokens_are_left_out(dtype, num_rows, columns, share, seed) -> None:
    """Masks are over tokens, which offsets make of columns; rows without one see all."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(num_rows, 32, generator=generator).to(dtype)
    weight = torch.randn(columns, 32, generator=generator).to(dtype)
    filled = torch.nn.functional.pad(weight, (0, 0, 0, -columns % 16), value=9.0)
    offsets = torch.randint(0, 5, (columns,), generator=generator).sort().values
    vocab_size = columns + 5
    allowed = torch.rand(4, -(-vocab_size // 32) * 32, generator=generator) < share
    bits = (allowed.view(4, -1, 32).long() << torch.arange(32)).sum(dim=-1)
    masks = torch.where(bits >= 2**31, bits - 2**32, bits).int()
    mask_of_row = torch.randint(-1, 4, (num_rows,), generator=generator).int()
    top_k = 6
    tokens, log_probs = top_tokens_cpu(
        rows, pack_weight(filled), columns, offsets, top_k, masks, mask_of_row
    )
    _, expected = reference.top_tokens(rows, weight, offsets, top_k, masks, mask_of_row)
    some = ~expected.isnan().all(dim=1)
    torch.testing.assert_close(log_probs[some], expected[some], rtol=TOLERANCE, atol=TOLERANCE)
    assert log_probs[~some].isnan().all() or not (~some).any()
    for row in torch.nonzero(mask_of_row >= 0).flatten().tolist():
        taken = tokens[row, log_probs[row] > -math.inf]
        assert allowed[mask_of_row[row], taken].all()
