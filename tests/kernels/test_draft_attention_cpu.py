# SPDX-License-Identifier: Apache-2.0
"""Draft-level attention: C++ against the float64 reference."""

import math

import pytest
import torch

from heterospec_vllm.kernels.cpu.draft_attention import draft_attention_cpu
from heterospec_vllm.kernels.reference import cpu as reference

pytestmark = pytest.mark.usefixtures("cpu_build")

# One unit in the last place of the output at values below 4; float32 sums in another order.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}


def _case(contexts, width, max_tail, heads, kv_heads, head_size, dtype, block_size=32):
    torch.manual_seed(0)
    num_blocks = sum(-(-c // block_size) for c in contexts) + 1
    kv = torch.full((num_blocks, kv_heads, 2 * block_size, head_size), math.nan, dtype=dtype)
    key_cache, value_cache = kv.chunk(2, dim=2)
    table = torch.zeros(len(contexts), 8 * max(contexts) // block_size + 2, dtype=torch.int32)
    block = 1
    for req, context in enumerate(contexts):
        for i in range(-(-context // block_size)):
            used = min(block_size, context - i * block_size)
            keys = torch.randn(kv_heads, head_size, used).to(dtype)
            key_cache[block].view(kv_heads, head_size, block_size)[:, :, :used] = keys
            value_cache[block, :, :used] = torch.randn(kv_heads, used, head_size).to(dtype)
            table[req, i] = block
            block += 1
    num_tokens = len(contexts) * width
    scratch = torch.randn(2, 40, kv_heads, head_size).to(dtype)
    scratch[:, 39] = math.nan  # a row nobody names
    tail = torch.randint(0, 39, (num_tokens, max_tail), dtype=torch.int32)
    if max_tail > 1:
        tail[::2, -1] = -1
    query = torch.randn(num_tokens, heads + 3, head_size).to(dtype)[:, :heads]
    return {
        "query": query,
        "key_cache": key_cache,
        "value_cache": value_cache,
        "query_start_loc": torch.arange(0, num_tokens + 1, width, dtype=torch.int32),
        "context_lens": torch.tensor(contexts, dtype=torch.int32),
        "block_table": table,
        "scratch_key": scratch[0],
        "scratch_value": scratch[1],
        "tail_index": tail,
        "scale": head_size**-0.5,
    }


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize(("heads", "kv_heads", "head_size"), [(9, 3, 64), (2, 2, 96), (8, 1, 128)])
@pytest.mark.parametrize(
    ("contexts", "width", "max_tail"),
    [([1], 1, 1), ([31, 32, 33], 4, 3), ([500], 8, 7), ([1, 127, 128, 129, 1000], 10, 2)],
)
def test_equals_the_reference(dtype, heads, kv_heads, head_size, contexts, width, max_tail) -> None:
    case = _case(contexts, width, max_tail, heads, kv_heads, head_size, dtype)
    got = torch.full((len(contexts) * width, heads, head_size), math.nan, dtype=dtype)
    expected = got.clone()
    draft_attention_cpu(output=got, **case)
    reference.draft_attention(output=expected, **case)
    torch.testing.assert_close(got, expected, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])


def test_a_row_without_tail_sees_the_pages_only() -> None:
    case = _case([40], 2, 1, 4, 2, 64, torch.float32)
    case["tail_index"].fill_(-1)
    got = torch.full((2, 4, 64), math.nan)
    expected = got.clone()
    draft_attention_cpu(output=got, **case)
    reference.draft_attention(output=expected, **case)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
