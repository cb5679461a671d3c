# SPDX-License-Identifier: Apache-2.0
"""The Triton tree attention against the float64 reference, and the reference against the CPU kernel's."""

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tree_attention_inputs import (
    RAGGED,
    TOLERANCES,
    Model,
    Request,
    assert_matches,
    assert_near,
    build,
    chain,
    empty_caches,
    random_tree,
    star,
)

from heterospec_vllm.kernels.cpu.tree_attention import LayerPages, TreeAttentionInputs, TreeRows
from heterospec_vllm.kernels.gpu import tree_attention_plan
from heterospec_vllm.kernels.gpu.tree_attention_plan import FP8
from heterospec_vllm.kernels.reference import cpu as reference

# Scores up to the cap of 5 carry the rounding of 2 sigmoid(2x) - 1: 2^-23 of 5, and weights feel it relatively.
SOFT_CAP_TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}


@pytest.mark.parametrize("group", [1, 3, 4, 8])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_ragged_batch(device: torch.device, dtype: torch.dtype, group: int) -> None:
    assert_matches(build(device, Model(group=group, dtype=dtype), RAGGED))


@pytest.mark.parametrize("head_size", [64, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_head_sizes(device: torch.device, dtype: torch.dtype, head_size: int) -> None:
    """96 is padded to 128: what lies beyond a row (the next row, NaN) must not be read into it."""
    model = Model(head_size=head_size, dtype=dtype, num_kv_heads=1)
    assert_matches(build(device, model, [Request(21, random_tree(6)), Request(0, chain(2))]))


@pytest.mark.parametrize("block_size", [16, 32, 48, 128])
def test_block_sizes(device: torch.device, block_size: int) -> None:
    """Context one short of a block, a full block, and some more; 48 is no power of two."""
    requests = [
        Request(block_size - 1, random_tree(9, 1)),
        Request(block_size, random_tree(9, 2)),
        Request(3 * block_size + 5, random_tree(9, 3)),
    ]
    assert_matches(build(device, Model(block_size=block_size, num_kv_heads=1), requests))


@pytest.mark.parametrize("context", [0, 1, 15, 16, 65])
@pytest.mark.parametrize(
    "parents",
    [chain(1), chain(2), chain(64), star(2), star(64), random_tree(64, 5), (-1,) * 5],
    ids=["root", "single", "chain64", "star2", "star64", "tree64", "forest"],
)
def test_tree_shapes(device: torch.device, parents: tuple[int, ...], context: int) -> None:
    """63 draft nodes and the root use every bit of the mask, the sign's included."""
    assert_matches(build(device, Model(group=1, num_kv_heads=1), [Request(context, parents)]))


@pytest.mark.parametrize("num_splits", [1, 4])
def test_long_context(device: torch.device, num_splits: int) -> None:
    requests = [Request(5000, random_tree(6)), Request(3, chain(2))]
    model = Model(group=4, num_kv_heads=1, block_size=128)
    assert_matches(build(device, model, requests, num_splits=num_splits))


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    group=st.sampled_from([1, 2, 3, 5, 8]),
    dtype=st.sampled_from(list(TOLERANCES)),
    block_size=st.sampled_from([16, 32, 48]),
    sizes=st.lists(st.tuples(st.integers(0, 90), st.integers(0, 64)), max_size=4),
    num_splits=st.sampled_from([1, 2]),
    seed=st.integers(0, 2**16),
)
def test_random_batches(
    device: torch.device,
    group: int,
    dtype: torch.dtype,
    block_size: int,
    sizes: list[tuple[int, int]],
    num_splits: int,
    seed: int,
) -> None:
    model = Model(group=group, num_kv_heads=1, dtype=dtype, block_size=block_size)
    requests = [Request(context, random_tree(rows, seed)) for context, rows in sizes]
    assert_matches(build(device, model, requests, seed=seed, num_splits=num_splits))


LAYOUTS = {
    "BHNC": (0, 1, 2, 3),
    "BNHC": (0, 2, 1, 3),
    "HBNC": (1, 0, 2, 3),
    "features first": (0, 1, 3, 2),  # like the CPU's keys
}


@pytest.mark.parametrize("order", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("head_size", [64, 96])
def test_cache_layouts(
    device: torch.device, order: tuple[int, int, int, int], head_size: int
) -> None:
    """K and V fused in one cache, in each memory order; layers further out only change the block stride."""
    model = Model(memory_order=order, head_size=head_size)
    assert_matches(build(device, model, RAGGED[2:5]))


def test_separate_strides_of_keys_and_values(device: torch.device) -> None:
    inputs = build(device, Model(), RAGGED)
    other = empty_caches(Model(memory_order=(0, 2, 1, 3)), inputs.key_cache.shape[0], device)[1]
    other.copy_(inputs.value_cache)
    inputs.value_cache = other
    assert inputs.value_cache.stride() != inputs.key_cache.stride()
    assert_matches(inputs)


@pytest.mark.parametrize("num_splits", [2, 4, 16])
@pytest.mark.parametrize("context", [0, 255, 256, 257, 600])
def test_split_equals_unsplit(device: torch.device, num_splits: int, context: int) -> None:
    """Shares without a slot, a short last share, and the reduction of rows of two requests."""
    requests = [Request(context, random_tree(7)), Request(9, chain(1))]
    model = Model(num_kv_heads=1)
    whole = build(device, model, requests)
    split = build(device, model, requests, num_splits=num_splits)
    assert_near(split.run(), whole.run())
    assert_matches(split)


@pytest.mark.parametrize("window", [1, 2, 5, 16, 40, 1000])
@pytest.mark.parametrize("num_splits", [1, 2])
def test_sliding_window(device: torch.device, window: int, num_splits: int) -> None:
    """Narrower than the tree is deep, narrower than the context, and wider than all."""
    requests = [
        Request(50, random_tree(9)),
        Request(3, chain(8)),
        Request(0, star(4)),
        Request(70, (-1,)),
    ]
    inputs = build(device, Model(group=3), requests, num_splits=num_splits, sliding_window=window)
    assert_matches(inputs)


def test_window_leaves_freed_blocks_alone(device: torch.device) -> None:
    """vLLM frees blocks that fell out of every row's window; their table entries name no block of the request."""
    inputs = build(device, Model(), [Request(70, random_tree(5))], sliding_window=20)
    expected = inputs.expected()
    inputs.block_table[0, :3] = -(2**30)
    assert_near(inputs.run(), expected)


@pytest.mark.parametrize("num_splits", [1, 2])
def test_soft_cap(device: torch.device, num_splits: int) -> None:
    inputs = build(device, Model(), RAGGED, num_splits=num_splits, soft_cap=5.0)
    inputs.query.mul_(4)
    assert_matches(inputs, SOFT_CAP_TOLERANCE)
    uncapped = replace(inputs, options={}).expected()
    assert not torch.allclose(inputs.run(), uncapped, rtol=0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num_splits", [1, 2])
@pytest.mark.parametrize("native", [False, True], ids=["bits", "native"])
def test_fp8_cache(
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    num_splits: int,
    native: bool,
) -> None:
    """Decoded bit by bit (before sm_89, ROCm, CPU) and loaded as the hardware's type; both are exact."""
    if native and device.type == "cuda" and not tree_attention_plan.decodes_fp8(device):
        pytest.skip("the device has no e4m3fn conversion")
    monkeypatch.setattr(tree_attention_plan, "decodes_fp8", lambda _: native)
    model = Model(dtype=dtype, kv_dtype=FP8)
    scales = {
        "k_scale": torch.tensor([0.5], device=device),
        "v_scale": torch.tensor([0.75], device=device),
    }
    assert_matches(build(device, model, RAGGED, num_splits=num_splits, **scales))


def test_every_fp8_value_is_decoded(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """All 256 codes as values of a single visible slot: subnormals, the largest, -0 and NaN."""
    monkeypatch.setattr(tree_attention_plan, "decodes_fp8", lambda _: False)
    one = torch.ones(1, device=device)
    model = Model(dtype=torch.float16, kv_dtype=FP8, group=1, num_kv_heads=4)
    inputs = build(device, model, [Request(0, (-1,))], k_scale=one, v_scale=one)
    codes = torch.arange(256, dtype=torch.uint8, device=device).view(4, 64)
    inputs.slot(inputs.value_cache, 0, 0).copy_(codes.view(FP8))
    inputs.slot(inputs.key_cache, 0, 0).zero_()
    codes_as_float = codes.view(FP8).to(torch.float16)
    finite = ~codes_as_float.isnan()
    broken_heads = ~finite.all(dim=1)
    output = inputs.run()[0]
    assert torch.equal(output[~broken_heads], codes_as_float[~broken_heads])
    assert output[broken_heads].isnan().all()
    inputs.slot(inputs.value_cache, 0, 0).copy_(codes_as_float.nan_to_num(1.0).to(FP8))
    assert torch.equal(inputs.run()[0], codes_as_float.nan_to_num(1.0))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_large_scores_do_not_overflow(device: torch.device, dtype: torch.dtype) -> None:
    """Scores of some thousands: each row's weight is on one key, so the output is its value."""
    inputs = build(device, Model(dtype=dtype), [Request(40, chain(4))])
    inputs.query.mul_(64)
    assert_matches(inputs, TOLERANCES[torch.bfloat16])


def test_ties_give_the_mean(device: torch.device) -> None:
    inputs = build(device, Model(), [Request(5, chain(3))])
    for slot in range(8):
        inputs.slot(inputs.key_cache, 0, slot).copy_(inputs.slot(inputs.key_cache, 0, 0))
    for row, output in enumerate(inputs.run()):
        seen = [inputs.slot(inputs.value_cache, 0, slot) for slot in range(6 + row)]
        assert_near(output.view(2, 2, -1)[:, 0], torch.stack(seen).mean(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_the_cpu_kernels_cache(device: torch.device, dtype: torch.dtype) -> None:
    """vLLM's `vec` layout is a matter of strides: this reference and kernel equal the CPU kernel's reference."""
    model = Model(dtype=dtype, block_size=32, memory_order=(0, 1, 3, 2))
    inputs = build(device, model, RAGGED)
    # [num_blocks, num_kv_heads, head_size, block_size] in memory, shaped as vLLM says
    keys = inputs.key_cache.transpose(2, 3).contiguous()
    values = inputs.value_cache.contiguous()
    tensors = inputs.tensors()
    pages = LayerPages(
        keys.view(keys.shape[0], keys.shape[1], keys.shape[3], keys.shape[2]),
        values,
        inputs.query.shape[1],
        inputs.scale,
    )
    rows = TreeRows(*(tensors[f.name] for f in fields(TreeRows) if f.name != "num_threads"))
    expected = inputs.poisoned_output()
    reference.tree_attention(TreeAttentionInputs(pages, rows, inputs.query), expected)
    inputs.key_cache, inputs.value_cache = keys.transpose(2, 3), values
    assert torch.equal(inputs.expected(), expected)
    assert_near(inputs.run(), expected)
