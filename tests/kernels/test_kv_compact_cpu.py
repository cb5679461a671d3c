# SPDX-License-Identifier: Apache-2.0
"""KV moves: C++ against the reference, and against what vLLM's own store op would have written."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heterospec_vllm.kernels.cpu.kv_compact import kv_compact_cpu
from heterospec_vllm.kernels.reference import cpu as reference


def _layers(count: int, dtype: torch.dtype, head_size: int = 64) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(4, 2, 32, 2 * head_size).to(dtype) for _ in range(count)]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 127), st.integers(0, 127)), max_size=12))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_the_reference(dtype, moves) -> None:
    sources = torch.tensor([s for s, _ in moves], dtype=torch.int64)
    targets = torch.tensor([t for _, t in moves], dtype=torch.int64)
    got, expected = _layers(3, dtype), _layers(3, dtype)
    kv_compact_cpu(got, sources, targets)
    reference.kv_compact(expected, sources, targets)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def test_moves_what_vllm_stored() -> None:
    """A token stored at slot 7 and moved to slot 40 is as if vLLM had stored it at 40."""
    from vllm import _custom_ops as ops

    keys, values = torch.randn(2, 1, 2, 64).unbind()
    stored = []
    for slot in (7, 40):
        cache = torch.zeros(4, 2, 32, 128)
        pages = cache.view(4, 2, 64, 64).chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(keys, values, *pages, torch.tensor([slot]), "vec")
        stored.append(cache)
    moved, wanted = stored
    kv_compact_cpu([moved], torch.tensor([7]), torch.tensor([40]))
    pages = moved.view(4, 2, 64, 64).chunk(2, dim=2)
    ops.cpu_attn_reshape_and_cache(
        torch.zeros_like(keys), torch.zeros_like(values), *pages, torch.tensor([7]), "vec"
    )
    assert torch.equal(moved, wanted)
