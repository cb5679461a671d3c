# SPDX-License-Identifier: Apache-2.0
"""Top-k and entropy of logits rows: the Triton kernels against the reference."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_up_trees import top_k_entropy

from heterospec_vllm.kernels.gpu import topk_entropy as ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Logits are read exactly in every dtype; what differs from float64 is float32 arithmetic: a sum of
# up to 2^18 exponentials and values of up to some hundred (relative 2^-24 each, so 1e-5 absolute).
LOG_TOLERANCE = {"rtol": 1e-5, "atol": 3e-5}
# Below ln 16 and made of at most 16 terms.
ENTROPY_TOLERANCE = {"rtol": 0, "atol": 1e-5}
pytestmark = pytest.mark.usefixtures("poisoned_scratch")
NAN = math.nan


def _run(logits: torch.Tensor, temperature: torch.Tensor, k: int) -> ops.TopKEntropy:
    """Runs the kernels on poisoned outputs."""
    out = ops.TopKEntropy.allocate(logits.shape[0], k, logits.device)
    for tensor in (out.log_probs, out.log_sum_exp, out.entropies):
        tensor.fill_(NAN)
    out.indices.fill_(-77)
    return ops.topk_entropy(logits, temperature, k, out)


def _assert_equal(got: ops.TopKEntropy, expected: ops.TopKEntropy) -> None:
    assert torch.equal(got.indices, expected.indices)
    torch.testing.assert_close(got.log_probs, expected.log_probs, **LOG_TOLERANCE)
    torch.testing.assert_close(got.log_sum_exp, expected.log_sum_exp, **LOG_TOLERANCE)
    torch.testing.assert_close(got.entropies, expected.entropies, **ENTROPY_TOLERANCE)


def _check(logits: torch.Tensor, temperature: torch.Tensor, k: int) -> ops.TopKEntropy:
    got = _run(logits, temperature, k)
    _assert_equal(got, ops.topk_entropy_reference(logits, temperature, k))
    return got


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    dtype=st.sampled_from(DTYPES),
    num_rows=st.integers(0, 4),
    vocab_size=st.sampled_from([1, 2, 7, 500, 8191, 8192, 8193, 20_001]),
    k=st.integers(1, 16),
    levels=st.sampled_from([1, 3, 50, 10**6]),
    seed=st.integers(0, 2**31),
)
def test_equals_the_reference(device, dtype, num_rows, vocab_size, k, levels, seed) -> None:
    """Few levels make ties likely; rows are wider than the vocabulary (padding holds NaN)."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.full((num_rows, vocab_size + 3), NAN)
    drawn = torch.randint(-levels, levels + 1, (num_rows, vocab_size), generator=generator)
    wide[:, :vocab_size] = drawn / max(levels / 9, 1)
    wide = wide.to(dtype).to(device)
    choice = torch.tensor([0.0, 0.3, 1.0, 2.5])
    temperature = choice[torch.randint(0, 4, (num_rows,), generator=generator)].to(device)
    _check(wide[:, :vocab_size], temperature, k)


def test_largest_vocabulary(device) -> None:
    torch.manual_seed(1)
    logits = (torch.randn(2, ops.MAX_VOCAB) * 5).to(torch.bfloat16).to(device)
    _check(logits, torch.tensor([1.0, 0.7], device=device), 16)


def test_ties_take_the_lowest_index_first(device) -> None:
    """Equal values in different chunks, and zeros of both signs."""
    logits = torch.full((2, 20_000), -5.0, device=device)
    logits[0, [19_000, 3, 9_000]] = 2.0
    logits[1, [4, 12_000]] = 0.0
    logits[1, [2, 15_000]] = -0.0
    got = _check(logits, torch.ones(2, device=device), 4)
    assert got.indices.tolist() == [[3, 9_000, 19_000, 0], [2, 4, 12_000, 15_000]]


def test_minus_infinity_and_nan(device) -> None:
    logits = torch.full((4, 9000), -math.inf, device=device)
    logits[1, 8500] = 1.5  # a single finite entry, in the last chunk
    logits[2, :3] = torch.tensor([NAN, 1.0, NAN])
    logits[2, 8999] = 1.0
    logits[3] = NAN
    got = _check(logits, torch.tensor([1.0, 1.0, 0.0, 0.5], device=device), 3)
    assert got.indices.tolist() == [[-1, -1, -1], [8500, -1, -1], [1, 8999, -1], [-1, -1, -1]]
    assert got.log_sum_exp.tolist()[0] == -math.inf
    assert got.log_probs[1].tolist() == [0.0, -math.inf, -math.inf]
    assert got.entropies.tolist() == pytest.approx([0, 0, math.log(2), 0], abs=1e-6)


def test_plus_infinity_is_the_largest_number(device) -> None:
    logits = torch.zeros(1, 100, device=device)
    logits[0, [5, 50]] = math.inf
    got = _check(logits, torch.tensor([0.5], device=device), 2)
    assert got.indices.tolist() == [[5, 50]]
    assert got.entropies.tolist() == pytest.approx([math.log(2)], abs=1e-6)


def test_entropy_is_the_policys(device) -> None:
    """The same number as the NumPy function that fitted the strata."""
    torch.manual_seed(2)
    logits = torch.randn(6, 300, device=device) * 4
    got = _run(logits, torch.ones(6, device=device), 8)
    expected = top_k_entropy(got.log_probs.cpu().numpy())
    torch.testing.assert_close(got.entropies.cpu(), torch.from_numpy(expected), **ENTROPY_TOLERANCE)


def test_strides_in_the_launchers_order_do_not_matter(device) -> None:
    """Every second row of a matrix, and one row repeated without a copy."""
    torch.manual_seed(3)
    logits = torch.randn(8, 777, device=device)
    ones = torch.ones(4, device=device)
    _check(logits[::2], ones, 5)
    _check(logits[:1].expand(4, -1), ones, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k: 0"),
        ({"k": 17}, "k: 17"),
        ({"logits": torch.zeros(2, 5, dtype=torch.float64)}, "logits: dtype"),
        ({"logits": torch.zeros(5)}, "logits: shape"),
        ({"logits": torch.zeros(2, 0)}, "logits: shape"),
        ({"logits": torch.zeros(1, 2**18 + 1).expand(2, -1)}, "logits: shape"),
        ({"logits": torch.zeros(5, 2).T}, "logits: the last dimension has stride 2"),
        ({"temperature": torch.ones(3)}, "temperature: "),
        ({"temperature": torch.ones(2, dtype=torch.float64)}, "temperature: "),
        ({"out": ops.TopKEntropy.allocate(2, 4, torch.device("cpu"))}, "out.log_probs: "),
    ],
)
def test_refuses_what_it_cannot_do(change, message) -> None:
    arguments = {"logits": torch.zeros(2, 5), "temperature": torch.ones(2), "k": 3} | change
    with pytest.raises(ValueError, match=message):
        ops.topk_entropy(**arguments)


def test_refuses_an_output_with_gaps() -> None:
    out = ops.TopKEntropy.allocate(2, 3, torch.device("cpu"))
    out = replace(out, entropies=torch.zeros(4)[::2])
    with pytest.raises(ValueError, match="out.entropies: must be contiguous"):
        ops.topk_entropy(torch.zeros(2, 5), torch.ones(2), 3, out)
