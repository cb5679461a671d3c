# SPDX-License-Identifier: Apache-2.0
"""Pages as vLLM lays them out for AMX: every kernel gives what it gives with the same keys in `vec` pages."""

import math
from dataclasses import replace

import pytest
import test_draft_attention_cpu as drafts
import test_head_layer_cpu as heads
import test_tree_attention_cpu as trees
import torch
from amx_pages import amx_pages

from heterospec_vllm.kernels.cpu.draft_attention import draft_attention_cpu
from heterospec_vllm.kernels.cpu.head_layer import head_layer_cpu
from heterospec_vllm.kernels.cpu.kv_compact import kv_compact_cpu
from heterospec_vllm.kernels.cpu.tree_attention import tree_attention_cpu

pytestmark = pytest.mark.usefixtures("cpu_build")

BF16 = torch.bfloat16


def _tiled(case: dict) -> dict:
    keys, values = amx_pages(case["key_cache"], case["value_cache"])
    return {**case, "key_cache": keys, "value_cache": values, "isa": "amx"}


@pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="vLLM tiles with AMX only")
def test_the_layout_is_what_vllm_stores() -> None:
    from vllm import _custom_ops as ops

    torch.manual_seed(0)
    keys, values = torch.randn(2, 64, 2, 96).to(BF16)
    stored = {}
    for isa in ("vec", "amx"):
        cache = torch.zeros(3, 2, 64, 2 * 96, dtype=BF16)
        pages = cache.view(3, 2, 128, 96).chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(keys, values, *pages, torch.arange(40, 104), isa)
        stored[isa] = pages
    for got, expected in zip(amx_pages(*stored["vec"]), stored["amx"], strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("head_size", [32, 64, 96, 128, 160, 256])
@pytest.mark.parametrize("block_size", [32, 128])
@pytest.mark.parametrize("context", [0, 1, 31, 127, 128, 300])
def test_tree_attention(context: int, block_size: int, head_size: int) -> None:
    """Slots that nobody filled hold NaN; the sums are the same ones in the same order but for the last bit."""
    model = trees.Model(head_size=head_size, dtype=BF16, block_size=block_size)
    parents = [trees.random_tree(9, context), trees.chain(1), trees.star(17), ()]
    inputs = trees.build(model, [trees.Request(context, p) for p in parents])
    expected = inputs.run().clone()
    got = torch.full_like(expected, math.nan)
    keys, values = amx_pages(inputs.pages.key_cache, inputs.pages.value_cache)
    tiled = replace(inputs.pages, key_cache=keys, value_cache=values, isa="amx")
    tree_attention_cpu(replace(inputs, pages=tiled), got)
    torch.testing.assert_close(got, expected, **trees.TOLERANCES[BF16])


@pytest.mark.parametrize("contexts", [[1], [31, 32, 33], [1, 127, 128, 129, 1000]])
def test_draft_attention(contexts: list[int]) -> None:
    case = drafts._case(contexts, 4, 3, 9, 3, 64, BF16)
    expected, got = torch.full((2, len(contexts) * 4, 9, 64), math.nan, dtype=BF16)
    draft_attention_cpu(output=expected, **case)
    draft_attention_cpu(output=got, **_tiled(case))
    torch.testing.assert_close(got, expected, rtol=2**-6, atol=2**-6)


def test_head_layer_reads_and_writes_pages() -> None:
    torch.manual_seed(0)
    weights = heads._weights(BF16)
    case = heads._case(weights, [15, 16, 40], 3, 2, paged=True)
    for name in ("key_cache", "value_cache"):
        case[name] = case[name].clone()
    tiled = _tiled(case)
    expected = head_layer_cpu(weights, **case)
    got = head_layer_cpu(weights, **tiled)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2**-6, atol=2**-6)
    pages = amx_pages(case["key_cache"], case["value_cache"])
    for name, page in zip(("key_cache", "value_cache"), pages, strict=True):
        torch.testing.assert_close(tiled[name], page, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("head_size", [32, 96])
def test_compaction(head_size: int) -> None:
    """Every parity of source and target, within a block and across."""
    torch.manual_seed(0)
    sources = torch.tensor([7, 6, 9, 8, 63, 40, 127])
    targets = torch.tensor([2, 3, 4, 11, 33, 96, 1])
    vec = torch.randn(4, 2, 32, 2 * head_size).to(BF16)

    def pages(cache: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return cache.view(4, 2, 64, head_size).chunk(2, dim=2)

    amx = torch.cat(amx_pages(*pages(vec)), dim=2).view_as(vec).contiguous()
    kv_compact_cpu([vec], sources, targets)
    kv_compact_cpu([amx], sources, targets, isa="amx")
    for got, expected in zip(pages(amx), amx_pages(*pages(vec)), strict=True):
        assert torch.equal(got, expected)


def test_other_dtypes_have_no_tiles() -> None:
    case = drafts._case([5], 1, 1, 2, 2, 64, torch.float32)
    with pytest.raises(AssertionError, match=r"torch\.float32 with isa amx"):
        draft_attention_cpu(output=torch.empty(1, 2, 64), **{**case, "isa": "amx"})
